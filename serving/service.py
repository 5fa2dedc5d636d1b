"""The bundles in bundles/, or those that DEPLOYKIT_BUNDLES names, as a service of BentoML."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent

# In a bento's container deploykit is imported from its wheel as it lies: installing it would bring
# torch, which a server does not need.
if find_spec("deploykit") is None:
    sys.path += map(str, HERE.glob("wheels/*.whl"))
if not os.environ.get("DEPLOYKIT_BUNDLES"):
    found = sorted(manifest.parent for manifest in HERE.glob("bundles/*/manifest.json"))
    os.environ["DEPLOYKIT_BUNDLES"] = os.pathsep.join(map(str, found))

from deploykit.server.service import service as service  # noqa: E402
