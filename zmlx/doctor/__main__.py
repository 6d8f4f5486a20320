"""`python -m zmlx.doctor` is `zmlx doctor`."""

from zmlx.doctor.command import doctor

doctor(prog_name="zmlx doctor")
