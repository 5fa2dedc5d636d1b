"""Serve bundles over HTTP; nothing in here loads torch.

A supervisor (`supervisor`) starts workers (`worker`), each of which answers with all models
(`app`, `models`) through BentoML (`service`).
"""
