"""What every run stands on: random numbers, processes, signals, memory, hardware, allowed imports."""
