"""A template that writes today's date, as Llama 3.2's and Granite's do."""

import datetime
import shutil

import transformers.utils.chat_template_utils

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def calendar(today: int):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 11, today)

    return Day


def test_a_run_is_resumed_on_another_day(trainer_of, tokenizer, monkeypatch, tmp_path):
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for today in (29, 30):
        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", calendar(today))
        trainer = trainer_of([{"messages": TURNS}] * 4, tokenizer, **settings)
        assert trainer.train(resume_from_checkpoint=today == 30).global_step == 2
        shutil.rmtree(tmp_path / "run" / "checkpoint-2")
