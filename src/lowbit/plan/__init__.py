"""What a run will need, and whether it can be made at all."""

from ..model.config import read_config as read_config
from .plan import HELD_OUT as HELD_OUT
from .plan import Plan as Plan
from .plan import Setting as Setting
from .plan import calibration_of as calibration_of
from .plan import make_plan as make_plan
from .plan import plan_for as plan_for
