"""`python -m zmlx.validate` is `zmlx validate`."""

from zmlx.validate import main

main()
