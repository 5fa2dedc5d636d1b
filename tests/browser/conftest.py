"""These tests open pages in a real browser: Chromium or Chrome, driven by Playwright."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("playwright") else ["test_*.py"]
