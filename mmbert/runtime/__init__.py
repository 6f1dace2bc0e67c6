"""Process-level utilities: random numbers, distributed processes, signals, memory, hardware, allowed imports."""
