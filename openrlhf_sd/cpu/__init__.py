"""What lets unmodified OpenRLHF train on a machine without CUDA. Nothing here is active where CUDA is present."""
