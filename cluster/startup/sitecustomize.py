"""Imported by every Python process of a cluster that `cluster.launch` starts, before anything else.

What a process imports stays, yet Python's cycle collector looks through all of it after every 700 new objects: a
quarter of a second in each of a dozen processes that start at once on few cores. Ten thousand is what Serve's own
proxies use. The collector still runs; a process that wants another number sets it later.
"""

import gc
import importlib
import sys

_OBJECTS_BETWEEN_COLLECTIONS = 10_000

gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])

# Python imports the first module of this name that it finds: let the machine's own follow, if there is one.
sys.path = [folder for folder in sys.path if folder != __file__.rpartition("/")[0]]
ours = sys.modules.pop(__name__)
try:
    importlib.import_module(__name__)
except ModuleNotFoundError as error:
    if error.name != __name__:
        raise
finally:
    sys.modules.setdefault(__name__, ours)  # the import system expects to find one
