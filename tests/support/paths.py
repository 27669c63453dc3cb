"""Where the repository's parts lie, for tests in any folder."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = SUPPORT.parents[1]
FIXTURES = REPOSITORY / "tests" / "fixtures"
EXAMPLES = REPOSITORY / "examples"
