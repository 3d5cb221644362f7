"""Judges say of an answer what it is worth: `verify` holds exact checks."""
