"""What the benchmark commands share: timing, the machine's measured peaks, the roofline, tables and comparisons."""
