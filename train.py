"""Train mmbert. Without arguments: the quickstart, which generates data/shapes if it is missing."""

from mmbert.cli.main import main

if __name__ == "__main__":
    main(default=["fit", "--config", "quickstart"])
