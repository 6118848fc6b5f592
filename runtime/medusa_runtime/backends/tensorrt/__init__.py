"""The backend for engines that TensorRT has compiled."""
