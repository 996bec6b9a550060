"""Measuring what a plan keeps of the dense model's answers, and what it saves."""
