"""Settings of every `Trainer` that mean nothing to a drafter's, or not here."""

import pytest

ROWS = [{"input_ids": [*range(20)], "labels": [*range(20)], "attention_mask": [1] * 20}]


@pytest.mark.parametrize(
    "setting",
    [{"label_smoothing_factor": 0.5}, {"fp16": True, "use_cpu": True}, {"neftune_noise_alpha": 5}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_of_no_meaning_is_refused_when_the_trainer_is_made(trainer_of, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        trainer_of(ROWS, **setting)
