"""What a frozen teacher says about a data set, on disk: computed once, read in every epoch and every run.

A cache is a folder: `manifest.json` says what it holds and whose it is, `shard-00000.safetensors` … hold rows one after
another, without padding. Shards are written to a temporary name and renamed, so a killed build leaves only whole shards
and goes on from there. `build.lock` keeps a second builder waiting. `import_published` makes one of files that others
wrote of a teacher.
"""

from fakit.training.teacher_cache.cache import TeacherCache
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import data_fingerprint, fingerprint
from fakit.training.teacher_cache.importing import completion_request, import_published, published_rows
from fakit.training.teacher_cache.size import PlannedCache

__all__ = [
    "CacheContent",
    "PlannedCache",
    "TeacherCache",
    "completion_request",
    "data_fingerprint",
    "fingerprint",
    "import_published",
    "published_rows",
]
