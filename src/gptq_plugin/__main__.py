"""``python -m gptq_plugin`` is the command ``gptq-plugin``. Tested by tests/apps/test_command.py: it is one line."""

import sys

from gptq_plugin.apps.command import main

if __name__ == "__main__":
    sys.exit(main())
