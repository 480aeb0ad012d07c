"""Online training: run_dpo.py's trainer, to which a round is an epoch whose pairs are made when it begins.

Version k of the weights is the policy after k rounds. Round k trains on answers that version k − staleness
has sampled (version 0 at the beginning). With staleness 0 it sends version k, waits for the answers, and
trains. With 1 it sends version k and trains on what is there already, while the servers sample for round
k + 1; the last step of a round waits for them, so that no checkpoint lies ahead of answers which are trained
on next and whose weights are gone.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig

from common import models as all_models
from common.cli import UserError, count
from common.manifest import write_jsonl
from common.records import read_generated
from common.tokens import PROMPT, RESPONSES
from common.training import is_main, say
from dpo_iteration import models, packing, reference, rounds_kl
from dpo_iteration import rows as of_pairs
from dpo_iteration.dpo import IterativeDPOTrainer, build_trainer, make_config
from dpo_iteration.live_weights import LiveWeights, weights_folder
from dpo_iteration.losses import needs_reference
from dpo_iteration.online_arguments import Arguments, Parts, last_round
from dpo_iteration.round_steps import round_steps
from dpo_iteration.rounds import (
    InBackground,
    Prompts,
    Ranks,
    RoundFolder,
    Scoring,
    check_version,
    figures_of,
    sample,
    sample_heldout,
)
from dpo_iteration.rounds_log import Log
from dpo_iteration.run_dpo import Data, choose_pairs
from generation.gen_hf import servers_of
from generation.sampling import load_prompts

PROBES = 4  # sequences by which servers are probed
LOOK = 5.0  # seconds after which the other processes are told that rank 0 still waits


class Online:
    """What is loaded once, and what each round does with it. All ranks call the methods.

    Args:
        args: of run_online.py. parts: of what it is made of.
    """

    def __init__(self, args: Arguments, parts: Parts):
        self.args, self.parts, self.dpo = args, parts, parts.training
        self.template = models.load_template(self.dpo)
        self.prompts = Prompts(args, parts.sampling)
        for job in parts.heldout[:1]:  # bad ones are refused before a round is trained
            load_prompts(job)
        self.scoring = Scoring(parts.scoring)  # before ZeRO-3 would cut up whatever is loaded
        _, self.sharing = packing.computation(self.dpo)
        self.steps = round_steps(self.dpo, self.sharing, args.prompts_per_round, args.sync_every)
        self.steps.take = self.take
        # Checkpoints are the run's; the policy is saved by itself.
        config = make_config(
            dataclasses.replace(self.dpo, output_dir=args.rounds_dir), self.steps.accumulation, False
        )
        models.prepare_sharding(config)
        self.ranks = Ranks(config.process_index, config.world_size)
        tokenizer = self.template.tokenizer
        self.reference = None  # where no loss looks at it
        if needs_reference(self.dpo.loss_type):
            start = models.load_model(args.model_name_or_path, self.dpo, config, self.dpo.revision)
            self.reference = reference.ready(start, config, self.sharing)
        self.passes = reference.passes_of(self.dpo, config, self.sharing, tokenizer)
        self.rows, self.first, self.ahead = [self.placeholder()], True, None
        self.log = Log(Path(args.rounds_dir) / "rounds.jsonl", is_main())
        self.trainer = self.make_trainer(config)
        folder = Path(self.told(str(weights_folder(args.rounds_dir, self.trainer.model))))
        self.live = LiveWeights(
            self.trainer, self.dpo, servers_of(args), folder, self.is_half(), args.share_gpus
        )

    def told(self, value: Any) -> Any:
        """What rank 0 says, on all ranks."""
        return broadcast_object_list([value], 0)[0]

    def encoded(self) -> list[list[int]]:
        """The first prompts of the first round as token ids."""
        longest, records = self.parts.sampling.max_input_length, self.prompts.of_round(0)
        found = (self.template.encode(one["prompt"], True, one.get("tools")) for one in records)
        return list(itertools.islice((ids for ids in found if 2 <= len(ids) <= longest), PROBES))

    def placeholder(self) -> dict:
        """A row for the trainer to begin with, before the first round has made any."""
        ids = self.encoded()[0]
        sides = {"prompt_ids": ids[:1], "chosen_ids": ids[1:], "rejected_ids": ids[:1]}
        return sides | {"margin": 1.0, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}

    def is_half(self) -> bool:
        """Whether trainer or servers compute in half precision."""
        dtype = self.parts.server_dtype
        if dtype == "auto":
            config = all_models.load_config(
                self.args.model_name_or_path, self.dpo.revision, self.dpo.trust_remote_code
            )
            dtype = str(config.dtype).removeprefix("torch.")
        return self.dpo.bf16 or dtype != "float32"

    def make_trainer(self, config: DPOConfig) -> IterativeDPOTrainer:
        """run_dpo.py's trainer on the batches of rounds."""
        policy = models.load_model(self.args.model_name_or_path, self.dpo, config, self.dpo.revision)
        source = models.Source.of(policy, self.template, self.dpo)
        steps, rows = {"train": self.steps, "eval": None}, {"train": self.rows, "eval": []}
        per_step = self.args.prompts_per_round / self.args.sync_every
        data = Data(None, rows, self.template, per_step, self.sharing, steps, config)
        trainer = build_trainer(self.dpo, policy, data)
        trainer.source = source
        # The schedule goes over all rounds, of which this start may do a part.
        total = self.args.rounds * self.args.sync_every
        create = trainer.create_scheduler
        trainer.create_scheduler = lambda num_training_steps, optimizer=None: create(total, optimizer)
        trainer.add_callback(Rhythm(self))
        return trainer

    # ---- A round ------------------------------------------------------------------------------------------

    def take(self, number: int) -> list[dict]:
        """The rows of a round: answers as they are there or are sampled now, scored, paired, tokenised, and
        with the reference's log-probabilities.
        """
        args, log = self.args, self.log
        folder, version = RoundFolder(args, number), max(0, number - args.staleness)
        log.begin(number, version, number - version)
        self.have_sampled(number, version)
        with log.timed("scoring"):
            check_version(folder, version)
            self.scoring.score(folder, self.ranks)
        self.rows[:] = self.make_rows(folder)
        with log.timed("reference"):
            self.add_reference()
        self.first = False
        if self.reference is not None and rounds_kl.is_plain(self.parts.sampling):
            with log.timed("kl"):
                given = folder.generated, self.trainer.model_wrapped, self.reference, self.passes
                log.add(**rounds_kl.estimate(*given))
        names = ("pairs", "prompts", "ties", "reward", "best", "kl")
        shown = ", ".join(f"{key} {log.entry[key]}" for key in names if key in log.entry)
        say(f"round {number + 1} of {args.rounds}: {shown}")
        return self.rows

    def add_reference(self):
        """Put the reference's log-probabilities into the rows of the round."""
        if self.reference is None:
            reference.leave_out(self.rows)
            return
        every = of_pairs.with_mismatched(self.rows)
        for done, values in reference.compute(self.reference, every, self.passes, check=self.first):
            for i in done:
                chosen, rejected = values[i].tolist()
                every[i] |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def have_sampled(self, number: int, version: int):
        """See to it that a round's answers are there, and with staleness the next one's on their way.

        Args:
            version: of the weights that sample them.
        """
        wanted = [k for k in (number, number + self.args.staleness) if k < self.args.rounds]
        missing = self.told([k for k in dict.fromkeys(wanted) if not RoundFolder(self.args, k).is_sampled()])
        if not missing:
            return
        if number in missing and version < number:
            raise UserError(
                f"the answers of round {number} are gone, and so are the weights that sampled them: delete "
                f"the checkpoints of {self.args.rounds_dir} from step {number * self.args.sync_every} on"
            )
        if number in missing:
            self.sample_now(number)
        else:
            self.send(number)
        if missing[-1] > number:
            self.ahead = self.start_sampling(missing[-1])

    def sample_now(self, number: int):
        """Have a round's prompts answered by the weights as they are; once more where a server lost them."""
        for _ in (1, 2):
            self.send(number)
            with self.log.timed("waiting"):
                lost = self.wait_for(self.start_sampling(number))
                self.live.sleep()
            if not lost:
                return
            say(f"note: {lost}: its answers are thrown away")
        raise UserError(f"{lost}, twice: look at the servers' logs, and start the same command again")

    def send_policy(self):
        """Let the servers have the policy that this start has made, where they are to answer by it. Before it
        is saved, which in bf16 casts the model that proves it.
        """
        if self.parts.heldout:
            self.send(last_round(self.args))

    def answer_heldout(self):
        """Have the held-out prompts answered by the policy that was sent. What fails is left to get_hf2.py,
        which needs its folder alone.
        """
        if not self.parts.heldout:
            return
        given = self.parts.heldout, self.args.output_dir, self.live.still_held
        try:
            failed = self.wait_for(not is_main() or InBackground(sample_heldout, *given))
            self.live.sleep()
        except UserError as error:  # on all ranks
            failed = str(error)
        if failed:
            say(f"note: the held-out prompts are not answered, generation/get_hf2.py can do it: {failed}")

    def send(self, number: int):
        """Let the servers have the weights that round `number` starts from."""
        with self.log.timed("sending"):
            self.live.send(number, self.probes())

    def probes(self) -> list[list[int]]:
        """Token ids of the first round's first answers behind their prompts; of prompts before that."""
        first, found = RoundFolder(self.args, 0), []
        if is_main() and first.is_sampled():
            records = itertools.islice(read_generated(first.generated), PROBES)
            found = [record[PROMPT] + record[RESPONSES][0] for record in records]
        return self.told(found) or self.encoded()

    def start_sampling(self, number: int) -> InBackground | bool:
        """A round's prompts on their way to the servers, by a thread of rank 0; True on the others."""
        if not is_main():
            return True
        live, folder = self.live, RoundFolder(self.args, number)
        probe = {url: dict(zip(("distance", "rounding"), found)) for url, found in live.figures.items()}
        given = folder, self.prompts, self.parts.sampling, live.version, probe, live.still_held
        return InBackground(sample, *given)

    def wait_for(self, work: InBackground | bool) -> str:
        """Wait on all ranks for what rank 0 has in the background; what it returned, or its error, on all.

        They talk to each other meanwhile: a collective that waits for minutes would be taken for dead. A
        server that has ended is not waited for: its weights are gone, and answers of another are none.
        """
        while not self.told(is_main() and work.is_done(LOOK)):
            self.live.check_there()
        error = work.error if is_main() else None
        if error is not None and not isinstance(error, UserError):
            raise error  # a defect: its traceback on rank 0, and the launcher ends the others
        told, value, seconds = self.told(is_main() and (str(error or ""), work.value, work.seconds))
        if told:
            raise UserError(told)
        self.log.spent("sampling", seconds)
        return value

    def make_rows(self, folder: RoundFolder) -> list[dict]:
        """The round's pairs as token ids; they are written beside its answers, too."""
        selection = choose_pairs(dataclasses.replace(self.dpo, train_dir=[str(folder.rewarded)]))
        rows = of_pairs.tokenize(selection, self.template, self.dpo)["train"]
        ties = selection.skipped_by_reason["equal rewards"]
        self.log.add(**figures_of(folder), pairs=len(rows), ties=ties)
        if is_main():
            write_jsonl(folder.pairs, selection.pairs)
            write_jsonl(folder.pairs.with_name("pairs.skipped.jsonl"), selection.skipped)
        if len(rows) < self.args.sync_every:
            reasons = ", ".join(f"{n} {reason}" for reason, n in selection.skipped_by_reason.items())
            raise UserError(
                f"round {folder.number} has {count(len(rows), 'pair')} for {self.args.sync_every} optimizer "
                f"steps (skipped: {reasons or 'none'}): give more prompts_per_round, or a smaller sync_every"
            )
        if self.first:
            of_pairs.check_bos(self.template.tokenizer, rows[0])
            models.check_models(self.dpo, self.template.tokenizer, {"train": rows, "eval": []})
            say(of_pairs.show_pair(self.template.tokenizer, rows[0]))
        return rows

    def end_round(self):
        """Before a checkpoint is written: wait for what is being sampled."""
        if self.ahead:
            with self.log.timed("waiting"):
                lost = self.wait_for(self.ahead)
            self.ahead = None
            if lost:  # the weights to send again are those that this round started from
                raise UserError(f"{lost}: its answers are thrown away; start the same command again")


class Rhythm(TrainerCallback):
    """Ends rounds in time for their log and checkpoint."""

    def __init__(self, online: Online):
        self.online = online

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object):
        own, every = self.online.args, self.online.args.sync_every
        if state.global_step % every:
            return
        done = state.global_step // every
        self.online.end_round()
        control.should_save = done % own.save_every == 0 or done == last_round(own)

    def on_log(self, args: object, state: TrainerState, control: object, logs: dict, **_: object):
        if "loss" in logs:
            self.online.log.end(logs)
