import sys
from pathlib import Path

from hypothesis import settings

# Helpers of these tests are plain modules beside them.
sys.path.insert(0, str(Path(__file__).parent))
# A busy machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
