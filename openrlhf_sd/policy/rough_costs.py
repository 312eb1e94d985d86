"""What steps cost on a machine nobody has calibrated, roughly: only ratios mean anything, in units of a plain step of one request.

Right within a factor of two between a large GPU and a small CPU; the rest is for live_costs.py to learn.
"""

from __future__ import annotations

BATCH_SLOPE = 1 / 128
"""What a request adds to a plain step: 1/250 on the published A100 sweeps, 1/8 on a small CPU."""

DRAFT_RATIO = 0.5
"""A draft step over a plain one: 0.45 on the A100, 0.6 to 0.7 on the CPUs we measured."""

VERIFY_OVERHEAD = 0.05
"""A verify step over a plain one, before its tokens count."""

TOKEN_SLOPE = 1 / 100
"""What a draft token adds to the step that verifies it, over a plain one."""


class RoughCosts:
    """`StepCosts`."""

    def target_step_s(self, batch, context):
        return 1 + BATCH_SLOPE * batch

    def draft_step_s(self, batch, context):
        return DRAFT_RATIO * self.target_step_s(batch, context)

    def verify_step_s(self, batch, context, gamma):
        return self.target_step_s(batch, context) * (1 + VERIFY_OVERHEAD + TOKEN_SLOPE * batch * gamma)
