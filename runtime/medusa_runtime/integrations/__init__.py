"""Services behind other servers: Ray Serve (``medusa_runtime.integrations.ray``) and Triton Inference Server."""
