"""Measured choices, shipped as data: which backend serves a stage best on a device."""
