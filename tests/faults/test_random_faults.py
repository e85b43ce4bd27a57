"""Scenario 30: random work under random faults, in an order that a seed decides. The oracle is asked at every rest.

The seed is printed; give it again to see the same order:

    FAULTS_SEED=… python -m pytest tests/faults/test_random_faults.py -m slow
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from itertools import count
from typing import ClassVar

from hypothesis.stateful import RuleBasedStateMachine

from schemas.events import UsageEvent
from tests.faults.house import House, Trusting
from worker.client import Billing

SEED = "FAULTS_SEED"
SECONDS = 20
STEPS = 60
MONTH = timedelta(days=30)


class Faults(RuleBasedStateMachine):
    """What producers, operators and disasters do to a house while a dyno is at work in it.

    One example follows the other in the same house; what was accepted in all of them must be there at every rest.
    """

    house: ClassVar[House]
    numbers: ClassVar[count[int]]
    until: ClassVar[float]
    rests: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.sent = 0
        self.billing = self.stack.enter_context(Billing.connect(self.house.settings, trust=Trusting()))
        self.dyno = self.stack.enter_context(self.house.dyno())
        self.unsure: list[UsageEvent] = []
