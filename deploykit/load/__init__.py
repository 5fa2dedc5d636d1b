"""Drive a server with requests, and tell what it made of them."""

from deploykit.load.connection import Request
from deploykit.load.loops import closed_loop, open_loop, run_load
from deploykit.load.tally import Load

__all__ = ["Load", "Request", "closed_loop", "open_loop", "run_load"]
