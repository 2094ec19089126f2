"""Figures of merit, per image; pure functions of arrays."""
