"""torchhal backend for NVIDIA Hopper and Blackwell GPUs, CUDA 12.8 and later."""
