"""The entry of `mmbert`, `python -m mmbert` and train.py."""

from mmbert.cli.main import main

if __name__ == "__main__":
    main()
