"""The HTTP server: an OpenAI-compatible Starlette application around AsyncLLM."""
