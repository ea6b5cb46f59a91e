"""The table of checks: what is looked for, in which order, and what it means."""

from __future__ import annotations

from lrprobe.diagnosis import accumulation, gradients, numerics, rates, resumes, schedules, wiring
from lrprobe.diagnosis.check import Check

CHECKS: tuple[Check, ...] = (
    Check(
        "finding",
        "no-steps",
        gradients.no_steps,
        (),
        "No step was recorded",
        "The optimizer's step is never called: a wrapper has a step of its own that does not "
        "call it, a gradient scaler skips every step, or another optimizer is stepped than "
        "the one that was attached to.",
        "See that optimizer.step() is called on the object that attach was given, or on a "
        "wrapper that it was looked through; print scaler.get_scale(): where it falls to 0, "
        "every gradient overflows.",
    ),
    Check(
        "finding",
        "nonfinite",
        numerics.nonfinite,
        (),
        "Values that are not finite reached a step",
        "The loss or one layer overflowed; from then on NaN spreads to every parameter, and the "
        "run cannot recover.",
        "Go back to a checkpoint before the first of these steps. Clip the gradient, lower the "
        "peak of lr or lengthen its warmup; in float16 use a GradScaler, which skips such steps. "
        "Attach with every=1 around the step to see which layer came first.",
    ),
    Check(
        "finding",
        "eps-underflows",
        numerics.eps_underflows,
        (),
        "ε is 0 in the parameters' dtype",
        "ε keeps the denominator away from 0, and in this dtype it rounds to 0: an element "
        "whose second moment is 0 or underflows divides 0 by 0, and the parameter is NaN from "
        "then on.",
        "Take eps=1e-4 or more in float16, or keep parameters and state in float32 or "
        "bfloat16 (autocast for the rest).",
        asks=("groups",),
    ),
    Check(
        "finding",
        "unexplained",
        numerics.unexplained,
        ("rule", "reconstruction_error"),
        "The rule does not explain the step that was taken",
        "The optimizer does not do what its class says: a subclass changes the step, something "
        "writes to the parameter between hooks (a clamp, a projection, an EMA swap), or its "
        "implementation is wrong, as torch 2.13's fused bfloat16 SGD on the CPU is "
        "(pytorch#191763).",
        "Compare a step with fused=False and foreach=False. If the optimizer is your own, give it "
        "a rule with lrprobe.register_rule and prove it with lrprobe.testing.check_rule.",
    ),
    Check(
        "finding",
        "state-unexplained",
        numerics.state_unexplained,
        ("state_error",),
        "The optimizer's state is not made of this gradient",
        "The moments in the state are not what the optimizer's equation makes of the "
        "gradient: an implementation pairs them wrongly, as torch 2.13's fused Adam on the "
        "CPU does where the strides of parameter and gradient differ, or something else "
        "writes to the state. The rates are made of that state.",
        "Compare a step with fused=False; make parameter and gradient contiguous alike "
        "(param.data = param.data.contiguous()).",
    ),
    Check(
        "finding",
        "step-stuck",
        wiring.step_stuck,
        (),
        "The optimizer's step count does not advance with its steps",
        "The count in the state is set back, rounded (bfloat16 has no 257) or counted twice. "
        "It is what corrects the bias of the moments: with a count that stays small the steps "
        "are several times too long.",
        "See what writes to state['step']: a cast of the state to bfloat16, a checkpoint's "
        "loader, a subclass. Keep it in float32 or as an int.",
        asks=("step_count",),
    ),
    Check(
        "finding",
        "state-lost",
        resumes.state_lost,
        (),
        "The optimizer's state was lost when the run was resumed",
        "The parameters came from a checkpoint and the optimizer did not: its moments began at 0 "
        "again, so that the first steps are many times too long or point elsewhere.",
        "Save optimizer.state_dict() and load it after the optimizer is made, before the first "
        "step; check that the parameter groups are in the same order.",
    ),
    Check(
        "finding",
        "lr-jumps",
        resumes.lr_jumps,
        ("group", "lr"),
        "The learning rate jumps where the run was resumed",
        "The scheduler began anew, or took the rate that the checkpoint's optimizer had as "
        "its base: its state was not saved, or it was made after the optimizer's state was "
        "loaded.",
        "Save scheduler.state_dict() with the optimizer's, make the scheduler before either "
        "is loaded, and load both; or give the schedule last_epoch and see that each group "
        "has its initial_lr.",
    ),
    Check(
        "finding",
        "schedule-stalled",
        resumes.schedule_stalled,
        ("group", "lr"),
        "The schedule stands still since the run was resumed",
        "The scheduler is not stepped any more, or it holds another optimizer than the one "
        "that steps.",
        "Make the scheduler with the optimizer that steps, and call scheduler.step() in the "
        "resumed loop too.",
    ),
    Check(
        "finding",
        "decay-jumps",
        resumes.decay_jumps,
        ("group", "lr", "decay"),
        "The weight decay of the first resumed step is another",
        "The first step after the resume was taken with the decay that the optimizer was made "
        "with, before the schedule or the checkpoint set it.",
        "Set the groups' weight_decay before the first step: step or apply the decay's "
        "schedule right after the checkpoint is loaded.",
    ),
    Check(
        "finding",
        "not-in-optimizer",
        wiring.not_in_optimizer,
        (),
        "A parameter that can be trained is in no optimizer",
        "It gets gradients, and nothing steps it: the head, or a layer that was added or "
        "unfrozen after the optimizer was made, was left out. (Or its optimizer has no "
        "probe.)",
        "Give it to the optimizer (add_param_group), or freeze it with requires_grad_(False). "
        "Attach to all optimizers of a model.",
        asks=("not_in_optimizer",),
    ),
    Check(
        "finding",
        "in-two-optimizers",
        wiring.in_two_optimizers,
        (),
        "Two optimizers step the same parameter",
        "Each step is taken twice, with two rates and two states: the lists of parameters overlap.",
        "Split the parameters so that each is in one optimizer.",
        asks=("in_two_optimizers",),
    ),
    Check(
        "finding",
        "gradients-accumulate",
        accumulation.gradients_accumulate,
        ("grad_persistence", "grad_norm"),
        "Each gradient contains the one before it",
        "zero_grad is missing, or is called on another optimizer or model, or less often than "
        "step: the gradient is a sum over all steps so far, which acts as momentum without "
        "any damping.",
        "Call optimizer.zero_grad() once for each step, before backward.",
    ),
    Check(
        "finding",
        "skipped-steps",
        gradients.skipped,
        ("stepped", "grad_norm"),
        "Many steps are skipped by the gradient scaler",
        "The gradients overflow again and again. A healthy scaler tries a larger scale once in "
        "2,000 steps and so skips one in 2,000.",
        "Look at the layer whose gradient overflows; clip it, lower lr, or use bfloat16, which "
        "needs no scaler. See that scaler.update() is called once a step.",
    ),
    Check(
        "finding",
        "never-steps",
        gradients.never_steps,
        ("stepped", "grad_norm", "lr"),
        "A parameter never moves",
        "It is frozen but still given to the optimizer, it is not used in the loss, or its output "
        "is detached; with a gradient of exactly 0, the units behind it are dead or masked.",
        "If it is frozen on purpose, do not give it to the optimizer. Else look for detach(), "
        "no_grad(), .data or an unused branch between it and the loss.",
    ),
    Check(
        "finding",
        "no-gradient",
        gradients.no_gradient,
        ("grad_norm", "lr"),
        "A layer gets a gradient of exactly 0",
        "Its units, or those behind it, are dead (a ReLU that is never active, a saturated gate): "
        "often a few steps that were far too long killed them, early in the run. Or the loss does "
        "not depend on it any more, or is exactly 0.",
        "Look at update_ratio in the steps before, and lower lr or warm up where it is above 0.1; "
        "look at the activations. A masked or finished part of the net is no fault.",
    ),
    Check(
        "finding",
        "moves-without-gradient",
        gradients.moves_without_gradient,
        ("grad_norm", "update_norm", "param_norm"),
        "A parameter moves without a gradient",
        "Weight decay or momentum moves what is not trained: a layer that was frozen by "
        "requires_grad_(False) while a zeroed gradient stayed, or rows of an embedding that "
        "are not in the batch.",
        "Take frozen parameters out of the optimizer, or zero_grad(set_to_none=True), so that "
        "it passes them over. Give embeddings weight_decay=0, or use sparse gradients and "
        "SparseAdam.",
        asks=("groups",),
    ),
    Check(
        "finding",
        "decayed-away",
        gradients.decayed,
        ("param_norm", "decay"),
        "A layer's weights have decayed away",
        "Weight decay is stronger than the gradient: each step takes the share lr·λ of a weight "
        "away, so that after 1/(lr·λ) steps little is left.",
        "Lower weight_decay (0.01 to 0.1 is usual for AdamW), and give biases and norms none.",
    ),
    Check(
        "finding",
        "negative-rate",
        schedules.negative_rate,
        ("lr",),
        "A learning rate is below 0",
        "A schedule went on beyond its end, as a linear decay does below 0: the optimizer "
        "then climbs.",
        "Clamp the factor at 0, and give the schedule as many steps as the training takes.",
    ),
    Check(
        "finding",
        "group-rate-zero",
        schedules.group_rate_zero,
        ("group", "lr"),
        "A parameter group's rate is 0",
        "The group's lr was set to 0, or a scheduler multiplies by 0. Where it became 0 before the "
        "end: the schedule was made for fewer steps than are taken.",
        "Set the group's lr, or take the group out of the optimizer; give the scheduler as many "
        "steps as the training takes (batches, not epochs, where it is stepped for each batch).",
    ),
    Check(
        "finding",
        "group-off-schedule",
        schedules.group_off_schedule,
        ("group", "lr"),
        "A parameter group does not follow the others' schedule",
        "Its lr is set by code that knows of the first group only (param_groups[0]), or its own "
        "function of a LambdaLR is constant. It is no fault where that is meant.",
        "Set lr in a loop over optimizer.param_groups; give each group the function that it is to "
        "follow.",
    ),
    Check(
        "finding",
        "group-rate-overwritten",
        schedules.group_rate_overwritten,
        ("group", "lr", "initial_lr"),
        "One rate was written over groups that have their own",
        "A schedule in a loop over param_groups sets one value for all, or a scheduler was "
        "given a single rate: the groups began with different rates, and now have the same.",
        "Multiply each group's own base (group['initial_lr']) by the schedule's factor.",
    ),
    Check(
        "finding",
        "schedule-not-reached",
        schedules.schedule_not_reached,
        ("group", "lr", "initial_lr"),
        "The warmup never reaches the group's rate",
        "The warmup is made for far more steps than are taken, or is stepped once an epoch "
        "where it counts batches.",
        "Step the scheduler for each batch, or give the warmup in the units in which it is "
        "stepped.",
    ),
    Check(
        "finding",
        "schedule-ends-early",
        schedules.schedule_ends_early,
        ("group", "lr"),
        "The learning rate is gone for more than half of the run",
        "The schedule was made for fewer steps than are taken: in epochs, for instance, and "
        "stepped for each batch.",
        "Step the scheduler once an epoch, or give it the number of batches.",
    ),
    Check(
        "finding",
        "always-clipped",
        gradients.always_clipped,
        ("grad_norm",),
        "The gradient is clipped in nearly every step",
        "The clip value is below the norm of nearly every gradient, so that it decides the "
        "length of the step: lr times the clip value. The gradient gives the direction only.",
        "Raise the clip value to about the largest usual norm, so that it cuts off what is "
        "unusual; or keep it and tune lr with it.",
    ),
    Check(
        "finding",
        "lost-updates",
        numerics.lost,
        ("lost_fraction", "zero_grad_fraction", "grad_norm", "numel", "lr"),
        "Updates are lost to rounding",
        "The update is smaller than half a unit in the last place of the parameter: in bfloat16, "
        "whatever is below 1/512 of it.",
        "Keep the parameters, or a master copy of them, in float32 (autocast for the rest), or "
        "round stochastically; a larger lr helps only as far as the training bears it.",
    ),
    Check(
        "finding",
        "adam-scale",
        rates.adam_scale,
        ("update_norm", "lr", "numel"),
        "Adam's steps do not have Adam's size",
        "An update of Adam is about lr in each element: at first 1·lr, later 0.1 to 0.3·lr. Above "
        "2·lr the bias correction is wrong: a step count that does not advance gives up to 2.2 "
        "with β = (0.9, 0.95). Below 0.01·lr the denominator is: ε, or a gradient that was huge "
        "once.",
        "See that state['step'] grows by one a step, also after a checkpoint is loaded and in a "
        "subclass; see eps and the history of grad_norm.",
        asks=("groups",),
    ),
    Check(
        "finding",
        "eps-rules",
        rates.eps_rules,
        ("eps_fraction", "zero_grad_fraction", "lr"),
        "ε rules the denominator",
        "The gradients are smaller than ε, so that the optimizer divides by a constant: it is SGD "
        "with momentum and the rate lr/ε, and what is adaptive about it is off.",
        "Lower eps (1e-8 is usual; with small gradients 1e-10 or less), or scale the loss: a mean "
        "over many tokens or a division by the accumulation steps made it small.",
    ),
    Check(
        "finding",
        "rate-collapsed",
        rates.rate_collapses,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's rate collapsed",
        "One huge gradient entered the second moment, which remembers it for 1/(1−β₂) steps: the "
        "layer stands still until it is forgotten.",
        "Clip the gradient before the step, look at the batch of that step, or lower β₂ (0.95) so "
        "that the optimizer forgets sooner.",
    ),
    Check(
        "finding",
        "rate-exploded",
        rates.rate_explodes,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's rate exploded",
        "The layer's gradients died away while those of others did not, and the second moment "
        "follows: the next gradient that is not small is multiplied by a huge rate.",
        "See why its gradient vanished (dead units, a mask, a saturated gate); raise eps, clip the "
        "update, or freeze the layer.",
    ),
    Check(
        "finding",
        "update-ratio",
        rates.update_ratio,
        ("update_ratio", "lr", "numel"),
        "A layer's updates are far off the usual size",
        "Near 1e-3 of the weights' norm a step is usual. Far above, the layer is rewritten every "
        "few steps; far below, it does not learn within the run.",
        "Change this layer's lr by about the factor that is missing (a parameter group of its "
        "own), or its initialisation; far above, warm up and clip.",
    ),
    Check(
        "note",
        "schedule-cycles",
        schedules.schedule_cycles,
        ("group", "lr"),
        "The learning rate falls and rises again",
        "A cyclic schedule, or warm restarts. Where none was meant: CosineAnnealingLR goes up "
        "again beyond T_max, for instance with T_max in epochs and a step for each batch.",
        "Nothing, if it is meant. Else give T_max as many steps as the scheduler is stepped.",
    ),
    Check(
        "note",
        "short-warmup",
        schedules.short_warmup,
        ("rule", "lr"),
        "The warmup is shorter than the second moment's memory",
        "The peak of lr comes while the second moment is still an average of few gradients, which "
        "makes the first long steps noisy.",
        "If the loss spikes early: warm up for about 1/(1−β₂) to 2/(1−β₂) steps, or lower β₂.",
        asks=("groups",),
    ),
    Check(
        "note",
        "adagrad-decay",
        rates.adagrad_decay,
        ("rule", "effective_lr_p50", "lr", "numel"),
        "Adagrad's rate has fallen a long way",
        "Adagrad adds up all squared gradients, so that its rate falls as 1/√t and never rises. "
        "That is its design.",
        "If the loss stands still too early: a larger lr, or an average that forgets (RMSprop, "
        "Adam, Adadelta).",
    ),
    Check(
        "note",
        "adadelta-eps",
        rates.adadelta_eps,
        ("rule", "eps_fraction", "lr"),
        "In Adadelta, ε decides",
        "Gradients are below √ε, so that both roots are √ε and the rate goes to lr: Zeiler saw "
        "it too. It is SGD with the rate lr then.",
        "Nothing, if it trains well. A smaller eps keeps the rate adaptive, and makes the first "
        "steps shorter.",
    ),
)
"""Every check, most severe first."""
