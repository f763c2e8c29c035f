"""The default model and the texts it is judged on."""
