"""`python -m eventstore` for the installed package; the module in a checkout needs no such file."""

import sys

from eventstore import main

sys.exit(main())
