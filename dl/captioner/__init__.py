"""The captioner: a frozen language model reads one embedding through a projector and LoRA, and describes the sound."""
