"""Measuring what a plan keeps of the dense model's answers, and what it saves."""

TASKS = ("passkey", "lines", "perplexity", "memory", "speed")
