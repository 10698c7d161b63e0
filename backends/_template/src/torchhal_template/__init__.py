"""The smallest torchhal backend that works: attention in plain torch, for float32 without masks."""
