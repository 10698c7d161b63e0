"""torchhal backend for Intel Arc and Core Ultra GPUs, Windows and Linux."""
