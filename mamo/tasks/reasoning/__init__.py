"""Reasoning over one image or a pair (NLVR, NLVR2)."""
