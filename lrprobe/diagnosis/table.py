"""The table of checks: what each one looks for, in which order, and what it means."""

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
        "The optimizer's step() never runs: a wrapper has its own step() that does not call it, "
        "a gradient scaler skips every step, or the loop steps a different optimizer from the "
        "one given to attach.",
        "Check that the loop calls step() on the object given to attach, or on a wrapper around "
        "it. Print scaler.get_scale(): if it falls to 0, every gradient overflows.",
    ),
    Check(
        "finding",
        "nonfinite",
        numerics.nonfinite,
        (),
        "NaN or infinite values reached a step",
        "The loss or one layer overflowed. NaN then spreads to every parameter, and the run "
        "cannot recover.",
        "Go back to a checkpoint before the first of these steps. Clip the gradient, lower the "
        "peak lr or lengthen its warmup; in float16 use a GradScaler, which skips such steps. "
        "Attach with every=1 around the step to see which layer came first.",
    ),
    Check(
        "finding",
        "eps-underflows",
        numerics.eps_underflows,
        (),
        "ε is 0 in the parameters' dtype",
        "ε keeps the denominator away from 0, but it rounds to 0 in this dtype. An element whose "
        "second moment is 0 or underflows divides 0 by 0, and the parameter is NaN from then on.",
        "Use eps=1e-4 or more in float16, or keep parameters and optimizer state in float32 or "
        "bfloat16 and use autocast for the forward pass.",
        asks=("groups",),
    ),
    Check(
        "finding",
        "unexplained",
        numerics.unexplained,
        ("rule", "reconstruction_error"),
        "The rule does not explain the actual step",
        "The optimizer does not do what its class says: a subclass changes the step, other code "
        "writes to the parameter between the hooks (a clamp, a projection, an EMA swap), or the "
        "implementation is wrong, as torch 2.13's fused bfloat16 SGD on the CPU is "
        "(pytorch#191763).",
        "Compare a step with fused=False and foreach=False. If the optimizer is your own, write "
        "a rule, register it with lrprobe.register_rule, and verify it with "
        "lrprobe.testing.check_rule.",
    ),
    Check(
        "finding",
        "state-unexplained",
        numerics.state_unexplained,
        ("state_error",),
        "The optimizer's state does not follow from this gradient",
        "The moments in the state are not what the optimizer's equations give for this gradient. "
        "Either the implementation pairs elements wrongly, as torch 2.13's fused Adam on the CPU "
        "does if parameter and gradient have different strides, or other code writes to the "
        "state. The rates are computed from that state.",
        "Compare a step with fused=False. Give parameter and gradient the same memory layout "
        "(param.data = param.data.contiguous()).",
    ),
    Check(
        "finding",
        "step-stuck",
        wiring.step_stuck,
        (),
        "The optimizer's step count does not advance with its steps",
        "The count in the state is reset, rounded (bfloat16 cannot represent 257) or incremented "
        "twice. The bias correction of the moments depends on it: if the count stays small, the "
        "steps are several times too long.",
        "Find what writes to state['step']: a cast of the state to bfloat16, a checkpoint loader, "
        "a subclass. Keep the count in float32 or as an int.",
        asks=("step_count",),
    ),
    Check(
        "finding",
        "state-lost",
        resumes.state_lost,
        (),
        "The optimizer's state was lost when the run resumed",
        "The parameters came from a checkpoint and the optimizer's state did not. Its moments "
        "started from 0 again, so the first steps are many times too long or point in another "
        "direction.",
        "Save optimizer.state_dict(), and load it after creating the optimizer and before the "
        "first step. Check that the parameter groups are in the same order.",
    ),
    Check(
        "finding",
        "lr-jumps",
        resumes.lr_jumps,
        ("group", "lr"),
        "The learning rate jumps where the run resumed",
        "The scheduler started over, or took the rate stored in the checkpoint's optimizer as its "
        "base rate. Its state was not saved, or it was created after the optimizer's state was "
        "loaded.",
        "Save scheduler.state_dict() with the optimizer's. Create the scheduler before loading "
        "either, then load both; or set last_epoch, and check that each group has its initial_lr.",
    ),
    Check(
        "finding",
        "schedule-stalled",
        resumes.schedule_stalled,
        ("group", "lr"),
        "The learning-rate schedule has stalled since the run resumed",
        "The resumed loop no longer steps the scheduler, or the scheduler holds an optimizer that "
        "is not the one being stepped.",
        "Create the scheduler with the optimizer that steps, and call scheduler.step() in the "
        "resumed loop too.",
    ),
    Check(
        "finding",
        "decay-jumps",
        resumes.decay_jumps,
        ("group", "lr", "decay"),
        "The first resumed step has a different weight decay",
        "The first step after the resume used the decay from the optimizer's constructor, before "
        "the schedule or the checkpoint set it.",
        "Set the groups' weight_decay before the first step: apply the decay schedule right after "
        "loading the checkpoint.",
    ),
    Check(
        "finding",
        "not-in-optimizer",
        wiring.not_in_optimizer,
        (),
        "A trainable parameter is in no optimizer",
        "It gets gradients, but no optimizer updates it: the head, or a layer that was added or "
        "unfrozen after the optimizer was created, was left out. (Or its optimizer has no "
        "probe.)",
        "Add it to the optimizer with add_param_group, or freeze it with requires_grad_(False). "
        "Attach to all optimizers of a model.",
        asks=("not_in_optimizer",),
    ),
    Check(
        "finding",
        "in-two-optimizers",
        wiring.in_two_optimizers,
        (),
        "Two optimizers step the same parameter",
        "The parameter lists overlap, so the parameter is updated twice per step, with two rates "
        "and two states.",
        "Split the parameters so that each is in one optimizer.",
        asks=("in_two_optimizers",),
    ),
    Check(
        "finding",
        "gradients-accumulate",
        accumulation.gradients_accumulate,
        ("grad_persistence", "grad_norm"),
        "Each gradient contains the one before it",
        "zero_grad is missing, is called on another optimizer or model, or is called less often "
        "than step. The gradient is a sum over all steps so far, which acts as momentum without "
        "any damping.",
        "Call optimizer.zero_grad() once per step, before backward.",
    ),
    Check(
        "finding",
        "skipped-steps",
        gradients.skipped,
        ("stepped", "grad_norm"),
        "The gradient scaler skips many steps",
        "The gradients overflow again and again. A healthy scaler tries a larger scale once in "
        "2,000 steps, and so skips about one step in 2,000.",
        "Find the layer whose gradient overflows; clip it, lower lr, or use bfloat16, which "
        "needs no scaler. Check that scaler.update() is called once per step.",
    ),
    Check(
        "finding",
        "never-steps",
        gradients.never_steps,
        ("stepped", "grad_norm", "lr"),
        "A parameter never moves",
        "It is frozen but still given to the optimizer, it is not used in the loss, or its output "
        "is detached. If its gradient is exactly 0, the units behind it are dead or masked.",
        "If it is frozen on purpose, leave it out of the optimizer. Otherwise look for detach(), "
        "no_grad(), .data or an unused branch between it and the loss.",
    ),
    Check(
        "finding",
        "no-gradient",
        gradients.no_gradient,
        ("grad_norm", "lr"),
        "A layer's gradient is exactly 0",
        "Its units, or those behind it, are dead (a ReLU that is never active, a saturated gate), "
        "often because a few oversized steps early in the run killed them. Or the loss no longer "
        "depends on the layer, or is exactly 0.",
        "Look at update_ratio in the steps before. If it is above 0.1, lower lr or warm up. Look "
        "at the activations. A masked or finished part of the network is not a fault.",
    ),
    Check(
        "finding",
        "moves-without-gradient",
        gradients.moves_without_gradient,
        ("grad_norm", "update_norm", "param_norm"),
        "A parameter moves without a gradient",
        "Weight decay or momentum moves what is not being trained: a layer frozen with "
        "requires_grad_(False) that kept a zeroed gradient, or rows of an embedding that are not "
        "in the batch.",
        "Remove frozen parameters from the optimizer, or call zero_grad(set_to_none=True), so "
        "that the optimizer skips them. Give embeddings weight_decay=0, or use sparse gradients "
        "and SparseAdam.",
        asks=("groups",),
    ),
    Check(
        "finding",
        "decayed-away",
        gradients.decayed,
        ("param_norm", "decay"),
        "A layer's weights have decayed away",
        "Weight decay is stronger than the gradient. Each step shrinks a weight by the fraction "
        "lr·λ, so little is left after 1/(lr·λ) steps.",
        "Lower weight_decay (0.01 to 0.1 is usual for AdamW), and exempt biases and norms.",
    ),
    Check(
        "finding",
        "negative-rate",
        schedules.negative_rate,
        ("lr",),
        "A learning rate is below 0",
        "A schedule went past its end, as a linear decay does below 0. The optimizer then climbs.",
        "Clamp the schedule's factor at 0, and give the schedule as many steps as the training "
        "has.",
    ),
    Check(
        "finding",
        "group-rate-zero",
        schedules.group_rate_zero,
        ("group", "lr"),
        "A parameter group's learning rate is 0",
        "The group's lr was set to 0, or a scheduler multiplies by 0. If it reached 0 before the "
        "end, the schedule was made for fewer steps than the training has.",
        "Set the group's lr, or remove the group from the optimizer. Give the scheduler as many "
        "steps as the training has: batches, not epochs, if it is stepped once per batch.",
    ),
    Check(
        "finding",
        "group-off-schedule",
        schedules.group_off_schedule,
        ("group", "lr"),
        "A parameter group does not follow the others' schedule",
        "The code that sets lr touches the first group only (param_groups[0]), or this group's "
        "function in a LambdaLR is constant. If that is intended, it is not a fault.",
        "Set lr in a loop over optimizer.param_groups; give each group the function that it "
        "should follow.",
    ),
    Check(
        "finding",
        "group-rate-overwritten",
        schedules.group_rate_overwritten,
        ("group", "lr", "initial_lr"),
        "One rate overwrote the rates of several groups",
        "The groups began with different rates and now share one: a schedule in a loop over "
        "param_groups sets a single value for all, or a scheduler was given a single rate.",
        "Multiply each group's own base rate (group['initial_lr']) by the schedule's factor.",
    ),
    Check(
        "finding",
        "schedule-not-reached",
        schedules.schedule_not_reached,
        ("group", "lr", "initial_lr"),
        "The warmup never reaches the group's rate",
        "The warmup is far longer than the training, or it counts batches and is stepped once "
        "per epoch.",
        "Step the scheduler once per batch, or give the warmup in the units in which it is "
        "stepped.",
    ),
    Check(
        "finding",
        "schedule-ends-early",
        schedules.schedule_ends_early,
        ("group", "lr"),
        "The learning rate is gone for more than half of the run",
        "The schedule was made for fewer steps than the training has: in epochs, for instance, "
        "and stepped once per batch.",
        "Step the scheduler once per epoch, or give it the number of batches.",
    ),
    Check(
        "finding",
        "always-clipped",
        gradients.always_clipped,
        ("grad_norm",),
        "Gradient clipping is active in nearly every step",
        "The clip value is below the norm of nearly every gradient, so it decides the length of "
        "the step: lr times the clip value. Only the direction comes from the gradient.",
        "Raise the clip value to about the largest usual norm, so that it cuts off only outliers; "
        "or keep it, and tune lr together with it.",
    ),
    Check(
        "finding",
        "lost-updates",
        numerics.lost,
        ("lost_fraction", "zero_grad_fraction", "grad_norm", "numel", "lr"),
        "Updates are lost to rounding",
        "The update is smaller than half a unit in the last place of the parameter: in bfloat16, "
        "anything below 1/512 of it.",
        "Keep the parameters, or a master copy of them, in float32 and use autocast, or round "
        "stochastically. A larger lr helps only as far as the training tolerates it.",
    ),
    Check(
        "finding",
        "adam-scale",
        rates.adam_scale,
        ("update_norm", "lr", "numel"),
        "Adam's steps do not have Adam's size",
        "An Adam update is about lr per element: 1·lr at first, 0.1 to 0.3·lr later. Above 2·lr, "
        "the bias correction is wrong: a step count that does not advance gives up to 2.2 with "
        "β = (0.9, 0.95). Below 0.01·lr, the denominator is too large, because of ε or of one "
        "huge past gradient.",
        "Check that state['step'] grows by one per step, also after a checkpoint is loaded and in "
        "a subclass. Check eps and the history of grad_norm.",
        asks=("groups",),
    ),
    Check(
        "finding",
        "eps-rules",
        rates.eps_rules,
        ("eps_fraction", "zero_grad_fraction", "lr"),
        "ε dominates the denominator",
        "The gradients are smaller than ε, so the optimizer divides by a constant. It is then SGD "
        "with momentum and the rate lr/ε, and no longer adapts to anything.",
        "Lower eps (1e-8 is usual; with small gradients 1e-10 or less), or scale the loss up: a "
        "mean over many tokens, or division by the accumulation steps, made it small.",
    ),
    Check(
        "finding",
        "rate-collapsed",
        rates.rate_collapses,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's effective rate collapsed",
        "One huge gradient entered the second moment, which remembers it for 1/(1−β₂) steps. The "
        "layer barely moves until it is forgotten.",
        "Clip the gradient before the step, inspect the batch of that step, or lower β₂ (0.95) so "
        "that the optimizer forgets sooner.",
    ),
    Check(
        "finding",
        "rate-exploded",
        rates.rate_explodes,
        ("effective_lr_p50", "lr", "rule"),
        "A layer's effective rate exploded",
        "The layer's gradients died away while those of other layers did not, and the second "
        "moment followed. The next gradient that is not small is multiplied by a huge rate.",
        "Find out why its gradient vanished (dead units, a mask, a saturated gate). Raise eps, "
        "clip the update, or freeze the layer.",
    ),
    Check(
        "finding",
        "update-ratio",
        rates.update_ratio,
        ("update_ratio", "lr", "numel"),
        "A layer's updates are far from the usual size",
        "A step is usually near 1e-3 of the weights' norm. Far above, the layer is rewritten "
        "every few steps; far below, it does not learn within the run.",
        "Change this layer's lr by about the missing factor, in a parameter group of its own, or "
        "change its initialisation. If the ratio is far above, also warm up and clip.",
    ),
    Check(
        "note",
        "schedule-cycles",
        schedules.schedule_cycles,
        ("group", "lr"),
        "The learning rate falls and rises again",
        "A cyclic schedule or warm restarts, if intended. If not: CosineAnnealingLR rises again "
        "beyond T_max, for instance if T_max is in epochs and the scheduler is stepped per batch.",
        "Nothing, if it is intended. Otherwise set T_max to the number of scheduler steps.",
    ),
    Check(
        "note",
        "short-warmup",
        schedules.short_warmup,
        ("rule", "lr"),
        "The warmup is shorter than the second moment's memory",
        "lr peaks while the second moment is still an average of few gradients, which makes the "
        "first long steps noisy.",
        "If the loss spikes early, warm up for about 1/(1−β₂) to 2/(1−β₂) steps, or lower β₂.",
        asks=("groups",),
    ),
    Check(
        "note",
        "adagrad-decay",
        rates.adagrad_decay,
        ("rule", "effective_lr_p50", "lr", "numel"),
        "Adagrad's rate has fallen a long way",
        "Adagrad sums all squared gradients, so its rate falls as 1/√t and never rises. That is "
        "its design.",
        "If the loss stalls too early, use a larger lr, or an optimizer whose average forgets "
        "(RMSprop, Adam, Adadelta).",
    ),
    Check(
        "note",
        "adadelta-eps",
        rates.adadelta_eps,
        ("rule", "eps_fraction", "lr"),
        "ε dominates Adadelta's rate",
        "The gradients are below √ε, so both roots are √ε and the rate approaches lr, as Zeiler "
        "also observed. Adadelta is then SGD with the rate lr.",
        "Nothing, if it trains well. A smaller eps keeps the rate adaptive, and makes the first "
        "steps shorter.",
    ),
)
"""Every check, most severe first."""
