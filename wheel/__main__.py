"""`python -m eventstore`, which a package does not do of itself as a module does."""

import sys

from eventstore import main

sys.exit(main())
