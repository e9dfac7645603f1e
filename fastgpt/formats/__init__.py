"""Checkpoints as other projects write them: Hugging Face, nanoGPT and llm.c."""
