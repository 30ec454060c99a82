# SPDX-License-Identifier: MIT
"""GRPO for an LLM that learns to use a search engine, and LLDS, the penalty that keeps it from collapsing.

    python llds.py                                       a tiny built-in agent, offline, on a laptop's CPU
    python llds.py --model Qwen/Qwen2.5-0.5B-Instruct    the same code with a real model, on one GPU

GRPO pushes down every token of a wrong response, also the good search it began with. What right and wrong
responses share then loses likelihood although nothing asked for it: lazy likelihood displacement. The model
grows unsure, the pushes grow larger, the run collapses. LLDS adds lambda * (how far responses no worse
than their group have lost likelihood since the rollout), and nothing where they have not. arXiv 2512.04220;
v1, v2: its versions; where we depart from it: README.md.

In the order of the data: settings, episode, rollout, losses, update, train, reports, questions and models. N
responses, T tokens (right-padded), M action tokens, D hidden units, V words; column t belongs to ids[:, t].
"""
import json, math, random, re, signal, string, sys, time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import pandas
import torch
from datasets import exceptions, load_dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, Cache, HfArgumentParser,
                          PreTrainedTokenizerFast, get_scheduler, set_seed)
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from retriever import (BM25, CLOSE, CORRECTION, OPEN, HTTPRetriever, information, lessons, load_corpus,
                       tiny_agent)

# ----------------------------------------------------------------------------------------------- settings
PROMPT = """Answer the question. Whenever you learn something, reason first, between <think> and </think>.
If you lack a fact, search for it with <search> your query </search>; passages come back between <information>
and </information>. You may search several times. Once you know enough, finish with <answer> your answer in as
few words as possible </answer>.
Question: {question}
"""

def flag(default, why):
    return field(**{"default_factory" if callable(default) else "default": default}, metadata={"help": why})

DEVICE, DTYPE = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")

@dataclass
class Config:
    """Every knob, once. Defaults suit the built-in agent; REAL_MODEL replaces some for a real model."""
    model: str = flag("tiny", "'tiny' (built in), a hub id, or a save_pretrained directory, such as runs/x")
    corpus: str = flag(str(Path(__file__).with_name("tiny_corpus.jsonl")), "passages to search, jsonl[.gz]")
    retriever_url: str = flag("", "search there instead, in Search-R1's protocol: http://HOST:8000/retrieve")
    train_data: str = flag("", "questions to train on: SET[,SET...], default: --corpus; see load_questions")
    eval_data: str = flag("", "held-out questions, in the same form; each set is scored by itself")
    reward_noise: float = flag(0.0, "chance of a right answer to earn 0, as one worded otherwise does")
    hops: int = flag(0, "train and evaluate only on questions of so many hops; 0: on all")
    output_dir: str = flag("", "default: runs/<model>-<time>")
    seed: int = flag(0, "of the weights, the order of the questions and the sampling")
    # the episode
    prompt: str = flag("{question}", "for questions that bring no prompt of their own")
    chat_template: Literal["auto", "on", "off"] = flag("auto", "auto: the tokenizer's when it has one")
    max_turns: int = flag(3, "turns in which a search is served; one more follows, for the answer")
    top_k: int = flag(3, "passages a search returns")
    max_new_tokens: int = flag(40, "tokens the model may write in a turn")
    max_feedback_tokens: int = flag(120, "tokens of a feedback; the text is cut, the block still closed")
    # GRPO
    steps: int = flag(40, "rounds of rollouts; each is followed by passes * mini_batches updates")
    questions_per_step: int = flag(16, "questions, and so groups, in a round")
    group_size: int = flag(8, "rollouts of one question; their mean reward is the baseline")
    mini_batches: int = flag(4, "updates in one pass over a round's rollouts")
    passes: int = flag(1, "over a round's rollouts; with 1, LLDS sees what updates on other questions did")
    learning_rate: float = flag(5e-4, "of AdamW, constant after the warm-up")
    warmup_ratio: float = flag(0.1, "share of the updates over which the learning rate rises from 0")
    clip: float = flag(0.2, "how far a token's likelihood ratio may move before its gradient stops")
    beta: float = flag(0.0, "KL coefficient, as in TRL: keeps the model near the weights it began with")
    freeze_embeddings: bool = flag(False, "they, and a head tied to them, keep their values in GRPO")
    temperature: float = flag(1.0, "of sampling and of all log-probabilities; evaluation is greedy")
    # LLDS
    llds_lambda: list[float] = flag(lambda: [0.1], "weight of the penalty; 0: plain GRPO; each its own run")
    llds_gate: Literal["token", "response", "action"] = flag("response", "what must have fallen, to count")
    answer_weight: str = flag("1", "on the answer's penalty: 0 to 1; 'adaptive': searches / 2, at most 1")
    # warm start, size, checkpoints, reports; with one of the last three flags nothing is trained
    warm_steps: int = flag(800, "supervised steps on scripted, imperfect episodes before GRPO")
    warm_learning_rate: float = flag(4e-3, "of these steps, falling to 0")
    rollout_batch: int = flag(256, "rollouts that share the KV cache at a time; a group at least")
    micro_batch_tokens: int = flag(2048, "padded tokens in one forward and backward pass")
    dtype: Literal["float32", "bfloat16"] = flag(DTYPE, "of matrix products; weights are always float32")
    gradient_checkpointing: bool = flag(DEVICE == "cuda", "keep the layers' inputs, compute the rest twice")
    save_steps: int = flag(50, "write a checkpoint every so many steps, and on Ctrl-C or SIGTERM")
    save_total_limit: int = flag(1, "checkpoints that are kept, the newest")
    resume: bool = flag(False, "go on from the last checkpoint in --output_dir; same flags, save MAY_CHANGE")
    eval_steps: int = flag(10, "evaluate on the held-out questions every so many steps")
    sample_every: int = flag(20, "print an episode every so many steps")
    tokens: bool = flag(False, "print that episode token by token as well")
    plot: bool = flag(False, "write curves.png (needs matplotlib)")
    probe: int = flag(0, "measure, on so many questions, what GRPO on one alone does to its right answers")
    eval: bool = flag(False, "evaluate --model on each set of --eval_data")
    ask: str = flag("", "answer this question with --model")

REAL_MODEL = dict(prompt=PROMPT, max_new_tokens=300, max_feedback_tokens=500, steps=200, group_size=5,
                  questions_per_step=32, mini_batches=8, learning_rate=1e-6, warmup_ratio=0.285, beta=0.001,
                  warm_learning_rate=1e-5, rollout_batch=80, micro_batch_tokens=16384)
LOWEST = dict(group_size=2, max_feedback_tokens=32, temperature=1e-3, hops=0, seed=0, steps=0, warm_steps=0,
              probe=0)  # least values; of every other number: 1 if whole, else 0

def check(ok, message):
    if not ok:
        sys.exit(print(f"llds.py: error: {message}", file=sys.stderr) or 2)

def parse_config(argv=None):
    """Command line -> Config. The preset follows --model; a saved run brings its own, in its config.json."""
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.partition("\n")[0])
    model = parser.parse_known_args(argv)[0].model
    if model != "tiny":
        file = Path(model) / "config.json"
        saved = json.loads(file.read_text()).get("llds", {}) if file.exists() else {}
        kept = {k: saved[k] for k in (*REAL_MODEL, "chat_template", "max_turns", "top_k") if k in saved}
        parser.set_defaults(**{**REAL_MODEL, **kept, "warm_steps": 0})
    cfg = Config(**vars(parser.parse_args(argv)))
    for name, value in (asdict(cfg) | {"llds_lambda": min(cfg.llds_lambda)}).items():
        low = LOWEST.get(name, int(type(value) is int))
        check(isinstance(value, str) or value >= low, f"--{name} must be at least {low}, not {value}")
    check(cfg.mini_batches <= cfg.questions_per_step, "--mini_batches is more than --questions_per_step")
    check(re.fullmatch(r"adaptive|1(\.0*)?|0(\.\d*)?|\.\d+", cfg.answer_weight),
          f"--answer_weight must be a number from 0 to 1, or 'adaptive', not {cfg.answer_weight!r}")
    check(not cfg.plot or find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
    check(cfg.output_dir or not cfg.resume, "--resume needs the --output_dir of the run")
    check(not cfg.ask or cfg.model != "tiny", "--ask needs a trained --model, such as runs/NAME")
    check(len({f"{x:g}" for x in cfg.llds_lambda}) == len(cfg.llds_lambda), "--llds_lambda: one value twice")
    if max(cfg.llds_lambda) > 0 and cfg.passes == 1 and (cfg.probe or cfg.mini_batches == 1):
        print("WARNING: with one update a round (--mini_batches, --passes) LLDS is 0", file=sys.stderr)
    return cfg

# ------------------------------------------------------------- episode: prompt, actions, feedback, reward
@dataclass
class Episode:
    """A question and all that followed. ids are exact: what was sampled is never decoded and re-encoded."""
    question: dict                                 # "question", "golden_answers", perhaps "prompt", "hops"
    ids: list                                      # prompt ...   action 1 ...   feedback ...   action 2 ...
    action_id: list                                # 0 0 0 0 0    1 1 1 1 1 1    0 0 0 0 0 0    2 2 2 2 2 2
    start: int                                     # where the current action begins in ids
    fed: int = 0                                   # ids[:fed] are in the KV cache, ids[fed:] are pending
    turn: int = 1
    searches: list = field(default_factory=list)   # of each served search: the contents that came back
    answer_start: int | None = None                # ids[answer_start:] is the answer, tags included
    reward: float = 0.0
    done: bool = False

def between(tag, text):
    """Between the first </tag> and the last <tag> before it: "<a> x <a> y </a> z" -> "y"; or None."""
    head, closed, _ = text.partition(f"</{tag}>")
    _, opened, inside = head.rpartition(f"<{tag}>")
    return inside.strip() if opened and closed else None

extract_answer = partial(between, "answer")  # text of an action -> str | None

def normalize_answer(text):
    """As Search-R1: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

def exact_match(prediction, golden_answers):
    """1.0 if the prediction equals a golden answer, both normalised, else 0.0."""
    return float(normalize_answer(prediction) in map(normalize_answer, golden_answers))

class Environment:
    """Where text and ids meet: makes prompts, sees where an action ends, runs it, appends the feedback. One
    more tool: its closing tag (if longer, also the window) in complete(), its feedback in respond()."""

    def __init__(self, tok, retriever, cfg, max_length=float("inf")):
        self.tok, self.retriever, self.cfg, self.max_length = tok, retriever, cfg, max_length
        self.template = cfg.chat_template != "off" and tok.chat_template is not None
        check(self.template or cfg.chat_template != "on", "--chat_template on: the tokenizer has none")
        self.decode = partial(tok.decode, clean_up_tokenization_spaces=False)
        # split_special_tokens: no document can smuggle in a special token
        self.encode = partial(tok.encode, add_special_tokens=False, split_special_tokens=True)
        # Only a token with ">" can complete a tag: "</search>" itself, or the end of a split one: ">" ">\n\n"
        self.closers = {i for i in range(len(tok)) if ">" in self.decode([i])}

    def reset(self, question):
        """A new Episode, ready for its first action."""
        messages = question.get("prompt") or [
            {"role": "user", "content": self.cfg.prompt.replace("{question}", question["question"])}]
        text = "\n".join(message["content"] for message in messages)
        if self.template:
            text = self.tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tok.encode(text, add_special_tokens=not self.template)
        check(len(ids) < self.max_length, f"prompt beyond the context of {self.max_length}: {text[:40]!r}...")
        return Episode(question, ids, [0] * len(ids), len(ids))

    def complete(self, e):
        """Does the newest token end the action: a closing tag, EOS, or no room for another token?"""
        action = e.ids[e.start:]
        full = len(action) >= self.cfg.max_new_tokens or len(e.ids) >= self.max_length
        # Each token of a closing tag holds one of its characters or more: 9 tokens hold all of "</search>".
        tail = self.decode(action[-len("</search>"):]) if action[-1] in self.closers else ""
        return full or action[-1] == self.tok.eos_token_id or "</search>" in tail or "</answer>" in tail

    def respond(self, episodes):
        """Runs the action that each episode has just completed: ends the episode, or appends feedback."""
        texts = [self.decode(e.ids[e.start:]) for e in episodes]
        for e, text in zip(episodes, texts):
            answer = extract_answer(text)
            e.done = answer is not None or e.turn > self.cfg.max_turns
            if answer is not None:  # its tokens: the fewest at the end that hold the opening tag
                e.answer_start = next(t for t in range(len(e.ids))[::-1]
                                      if "<answer>" in self.decode(e.ids[t:]))
                e.reward = exact_match(answer, e.question["golden_answers"])
        going_on = [(e, between("search", text)) for e, text in zip(episodes, texts) if not e.done]
        queries = [query for _, query in going_on if query is not None]
        found = iter(self.retriever.search(queries, self.cfg.top_k))
        head, tail, limit = self.encode(OPEN), self.encode(CLOSE), self.cfg.max_feedback_tokens
        for e, query in going_on:
            feedback = self.encode(CORRECTION)[:limit]
            if query is not None:
                passages = next(found)
                e.searches.append([passage["contents"] for passage in passages])
                text = self.encode(information(passages))[:max(0, limit - len(head) - len(tail))]
                feedback = head + text + tail
            e.done = len(e.ids) + len(feedback) >= self.max_length  # the context is full
            if not e.done:
                e.ids, e.action_id = e.ids + feedback, e.action_id + [0] * len(feedback)
                e.turn, e.start = e.turn + 1, len(e.ids)

# ------------------------------------------------------------------------------------------------ rollout
class SlotCache(Cache):
    """One preallocated KV cache for all rollouts, in which a token's cell is its position: row r's token at
    position p lives in buffer[r, :, p]. The mask is "cell <= position", nothing is concatenated or shifted,
    and what the padding of a chunk leaves behind is overwritten before any query may look at it. feed() sets
    rows and position (whom it feeds, and where), used and all_live; then each layer calls update()."""

    def __init__(self, rows, cells):
        super().__init__(layers=[])
        self.size, self.store = (rows, cells + 1), {}  # the last cell takes padding that would fall outside

    def update(self, keys, values, layer, *args, **kwargs):
        new = keys.to(values.dtype), values  # the rotary embedding makes keys float32 under autocast
        if layer not in self.store:  # zeros, not empty: 0 * NaN would be NaN
            self.store[layer] = [x.new_zeros(self.size[0], x.shape[1], self.size[1], x.shape[3]) for x in new]
        for buffer, x in zip(self.store[layer], new):
            buffer[self.rows[:, None], :, self.position] = x.transpose(1, 2)
        rows = slice(len(self.rows)) if self.all_live else self.rows  # a slice is a view, an index would copy
        return [buffer[rows, :, :self.used] for buffer in self.store[layer]]

    def copy(self, source, targets, cells):
        for buffer in chain(*self.store.values()):
            buffer[targets, :, :cells] = buffer[source, :, :cells]

@torch.no_grad()
def rollout(model, env, questions, group_size=1, temperature=1.0):
    """Plays and returns group_size Episodes of each question, groups in that order; temperature 0 is greedy.
    No token enters the model twice. A forward pass feeds one pending token to each live row; a row with none
    left samples its next. Feedback is pending too: once a quarter of the rows have some, in one pass."""
    cfg, groups = env.cfg, [[env.reset(question) for _ in range(group_size)] for question in questions]
    longest = max(len(e.ids) for e, *_ in groups) + cfg.max_new_tokens
    cells = min(longest + cfg.max_turns * (cfg.max_new_tokens + cfg.max_feedback_tokens), env.max_length)
    cache = SlotCache(min(max(cfg.rollout_batch, group_size), len(groups) * group_size), cells)
    todo, live = groups[::-1], []  # live[r] sits in row r of the cache
    bar = tqdm(total=len(groups) * group_size, desc="rollout", leave=False, delay=5)

    def feed(rows, most):
        """Feeds up to `most` pending tokens to each of rows; returns the logits after the last one."""
        chunks = [live[r].ids[live[r].fed:live[r].fed + most] for r in rows]
        width = max(map(len, chunks))
        ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=DEVICE)
        position = torch.tensor([live[r].fed for r in rows])[:, None] + torch.arange(width)    # (rows, width)
        cache.rows, cache.position = torch.tensor(rows, device=DEVICE), position.clamp(max=cells).to(DEVICE)
        for r, chunk in zip(rows, chunks):
            live[r].fed += len(chunk)
        cache.used, cache.all_live = max(live[r].fed for r in rows), len(rows) == len(live)
        mask = torch.arange(cache.used, device=DEVICE) <= cache.position[:, None, :, None]
        hidden = model.base_model(ids, mask, cache.position, cache, use_cache=True)[0]  # (rows, width, D)
        last = hidden[range(len(rows)), [len(chunk) - 1 for chunk in chunks]]
        return model.get_output_embeddings()(last).float()                              # (rows, V)

    while todo or live:
        playing = len(live)
        while todo and len(live) + group_size <= cache.size[0]:  # 1. whole groups take free rows
            live += todo.pop()
        if len(live) > playing:  # 2. feed a group's prompt, once, and copy it to the group's other rows;
            active = range(playing, len(live))
            logits = feed(active[::group_size], cells).repeat_interleave(group_size, dim=0)
            for r in active[::group_size]:
                cache.copy(r, slice(r + 1, r + group_size), live[r].fed)
            for r in active:
                live[r].fed = len(live[r].ids)
        else:  # or all feedback that is pending, or one token to each row
            waiting = [r for r, e in enumerate(live) if e.fed + 1 < len(e.ids)]
            active, most = (waiting, cells) if 4 * len(waiting) >= len(live) else (range(len(live)), 1)
            logits = feed(active, most)
        tokens = (logits / temperature).softmax(1).multinomial(1)[:, 0] if temperature else logits.argmax(1)
        drawn = zip([live[r] for r in active], tokens.tolist())  # 3. sample
        drawn = [(e, token) for e, token in drawn if e.fed == len(e.ids)]  # others have feedback left to read
        for e, token in drawn:
            e.ids.append(token)
            e.action_id.append(e.turn)
        env.respond([e for e, _ in drawn if env.complete(e)])  # 4. run the actions that are complete
        for r in reversed([r for r, e in enumerate(live) if e.done]):  # 5. the last row takes the freed one
            cache.copy(len(live) - 1, r, live[-1].fed)
            live[r] = live[-1]
            live.pop()
            bar.update()
    bar.close()
    return list(chain(*groups))

# ------------------------------------------------------ losses: they need torch alone; copy from here ...
def group_advantages(rewards, group_size):
    """Advantage, how much better than its group a response is; the loss makes it likelier if above 0, less so
    if below: A = (r - mean) / (std + 1e-6) (v2 eq. 1; sample std and 1e-6 as in the official code).
    rewards: (N,), a group's side by side. Returns (N,), exactly 0 where a group's rewards are all equal."""
    groups = rewards.float().view(-1, group_size)                               # (N / group_size, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = (centred.square().sum(dim=1, keepdim=True) / max(1, group_size - 1)).sqrt()
    spread = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    return torch.where(spread, centred / (std + 1e-6), 0.0).view(-1)

def action_ids(mask):
    """action_id from a 0/1 mask, for other trainers; (N, T): [0, 1, 1, 0, 1] -> [0, 1, 1, 0, 2]"""
    mask = mask.long()
    return (mask.diff(dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).cumsum(dim=1) * mask

def policy_loss(logp, old_logp, advantages, mask, clip=0.2, denom=None):
    """GRPO with masked feedback: the clipped objective (v2 eq. 1), token mean like the official code.
    logp, old_logp, mask: (N, T); advantages: (N,). denom replaces mask.sum(), so that micro-batches add up.
    Returns (loss, info): how many tokens' gradient the clip stopped, and the largest ratio."""
    mask, advantages = mask.bool(), advantages[:, None]                                 # (N, T), (N, 1)
    ratio = (logp - old_logp.detach()).masked_fill(~mask, 0).exp()  # masked before exp: no inf * 0
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    loss = -(surrogate * mask).sum() / max(1, mask.sum() if denom is None else denom)
    beyond = (advantages > 0) & (ratio > 1 + clip) | (advantages < 0) & (ratio < 1 - clip)  # clamp() wins
    return loss, {"clipped": (beyond & mask).sum(), "ratio_max": (ratio * mask).detach().max()}

def kl_penalty(logp, ref_logp, mask, denom=None):
    """KL to the reference (the initial model), by k3: exp(r) - r - 1 with r = ref_logp - logp, token mean.
    logp, ref_logp, mask: (N, T). denom replaces mask.sum(). Returns the loss."""
    r = (ref_logp.detach() - logp).masked_fill(~mask.bool(), 0)                         # (N, T)
    return (r.exp() - r - 1).sum() / max(1, mask.sum() if denom is None else denom)

def llds_penalty(logp, old_logp, advantages, action_id, gate="response", answer_mask=None, answer_weight=1.0,
                 denom=None):
    """How far the likelihood of preserved responses has fallen since the rollout (v1; v2 eq. 4, 5, 9, 10):

        sum of gate * answer_weight * max(0, old_logp - logp) over their action tokens / how many these are,
        gate: 1 where the unit's likelihood has fallen, else 0

    logp, old_logp: (N, T), the new policy and the one that made the rollouts. advantages: (N,); A >= 0 is
        preserved, so also a group all right or all wrong. action_id: (N, T), k on tokens of the k-th action,
        0 on prompt, feedback and padding.
    gate: the unit whose summed likelihood must have fallen, else its tokens cost nothing: the "token"
        (v2 eq. 9), the "response" (v1; v2 eq. 10) or the "action" (v2 eq. 4).
    answer_mask: (N, T), the final answer's tokens; answer_weight in [0, 1] multiplies their penalty, not what
        the gate sees (LLDS with masked answer, LLDS-MA: 0 in v1, any weight in v2 eq. 5).
    denom replaces the count of preserved action tokens, gated or not, so that micro-batches add up.
    Returns (loss, info), counts that add up too. ValueError: unknown gate, unusable answer_weight."""
    if gate not in ("token", "response", "action"):
        raise ValueError(f"gate must be 'token', 'response' or 'action', not {gate!r}")
    if not 0 <= answer_weight <= 1 or answer_weight != 1 and answer_mask is None:
        raise ValueError(f"answer_weight {answer_weight}: must be in [0, 1], and needs answer_mask unless 1")
    preserved = (action_id > 0) & (advantages >= 0)[:, None]                            # (N, T)
    delta = (old_logp.detach() - logp).masked_fill(~preserved, 0)                       # > 0: it fell
    # A row's units are numbered from 1 on; what is not preserved is in unit 0, where nothing can have fallen.
    unit = preserved.long() * {"token": preserved.cumsum(dim=1), "response": 1, "action": action_id}[gate]
    per_unit = torch.zeros(logp.shape[0], unit.max() + 1, device=logp.device)           # (N, units + 1)
    is_open = per_unit.scatter_add(1, unit, delta.detach().float()) > 0  # the gates: constants
    exists = per_unit.scatter_add(1, unit, preserved.float()) > 0
    weight = 1.0 if answer_mask is None else torch.where(answer_mask.bool(), answer_weight, 1.0)
    penalty = torch.relu(delta) * is_open.gather(1, unit) * weight  # relu: at 0 clamp() has gradient 1
    loss = penalty.sum() / max(1, preserved.sum() if denom is None else denom)
    return loss, {"preserved_tokens": preserved.sum(), "penalized_tokens": (penalty > 0).sum(),
                  "units": exists[:, 1:].sum(), "open_units": is_open[:, 1:].sum()}

# ------------------------------------------------------------------------------- ... copy to here. Update
def token_logps(model, ids, action_id, temperature=1.0, chunk=256):
    """Log-probability of each action token under the tempered distribution that sampled it, and its entropy.
    ids, action_id: (N, T). Right padding needs no attention mask: causal attention never looks right. Returns
    (logp, entropy): (N, T) float32, in nats, 0 outside actions. Only the hidden states that predict an action
    token meet the LM head, `chunk` at a time and again in backward: (N, T, V) logits never exist."""
    row, column = (action_id[:, 1:] > 0).nonzero(as_tuple=True)  # (M,) each; the one shift: hidden column t
    width = max(column.tolist(), default=0) + 2                  # predicts ids column t + 1
    hidden = model.base_model(input_ids=ids[:, :width], use_cache=False)[0][row, column]  # (M, D)
    target = ids[row, column + 1]                                                       # (M,)

    def head(hidden, target):
        logp = (model.get_output_embeddings()(hidden).float() / temperature).log_softmax(dim=-1)  # (chunk, V)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).detach().sum(dim=-1)

    parts = map(partial(checkpoint, head, use_reentrant=False), hidden.split(chunk), target.split(chunk))
    zeros = torch.zeros(ids.shape, device=ids.device)
    return tuple(zeros.index_put((row, column + 1), torch.cat(part)) for part in zip(*parts))

def pad(episodes):
    """Episodes -> ids, action_id, answer_mask: (N, T) long each, right-padded with 0."""
    answers = [[int(t >= (e.answer_start or len(e.ids))) for t in range(len(e.ids))] for e in episodes]
    columns = [e.ids for e in episodes], [e.action_id for e in episodes], answers
    return [pad_sequence([*map(torch.tensor, rows)], batch_first=True).to(DEVICE) for rows in columns]

def split(lengths, group_size, mini_batches, max_tokens):
    """Shuffled groups -> mini-batches -> micro-batches: rows by length, that padded fit max_tokens."""
    lengths, plan = torch.tensor(lengths), []
    for groups in torch.randperm(len(lengths) // group_size).tensor_split(mini_batches):
        rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
        rows = rows[lengths[rows].argsort()]
        plan.append(rows.split(max(1, max_tokens // int(lengths[rows[-1]]))))
    return plan

def mean(values):
    return sum(values) / len(values) if values else None

def update(model, optimizer, scheduler):
    """One optimizer step, the gradient cut to norm 1; none if it is not finite. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return norm

def snapshot(model):
    """A copy of the weights on the CPU, where they cost no GPU memory."""
    return {name: x.to("cpu", copy=True) for name, x in model.state_dict().items()}

def train_step(model, reference, optimizer, scheduler, episodes, llds_lambda, cfg):
    """The updates that follow a round of rollouts. Returns (metrics, (advantages, old_logp, new_logp)).
    reference: for the KL term, a snapshot whose weights the model takes up for a moment."""
    ids, action_id, answer_mask = pad(episodes)                                         # (N, T) each
    is_action, rewards = action_id > 0, torch.tensor([e.reward for e in episodes], device=DEVICE)
    advantages = group_advantages(rewards, cfg.group_size)                              # (N,)
    searches = mean([len(e.searches) for e in episodes])
    answer_weight = min(searches / 2, 1.0) if cfg.answer_weight == "adaptive" else float(cfg.answer_weight)
    plan = split([len(e.ids) for e in episodes], cfg.group_size, cfg.mini_batches, cfg.micro_batch_tokens)

    @torch.no_grad()
    def all_logps():  # in the updates' own micro-batches: until weights move, new = old to the last bit
        out = torch.zeros(2, *ids.shape, device=DEVICE)
        for rows in chain(*plan):
            out[:, rows] = torch.stack(token_logps(model, ids[rows], action_id[rows], cfg.temperature))
        return out

    old_logp, entropy = all_logps()
    ref_logp = old_logp  # without beta, kl is measured against the policy of the rollouts
    if cfg.beta > 0:
        now = snapshot(model)
        model.load_state_dict(reference)
        ref_logp = all_logps()[0]
        model.load_state_dict(now)
    total, grad_norms = defaultdict(float), []  # a norm for each update
    for mini_batch in plan * cfg.passes:
        members = torch.cat(mini_batch)
        action_tokens = is_action[members].sum()  # the two normalisers, of all its micro-batches together
        preserved_tokens = is_action[members][advantages[members] >= 0].sum()
        for rows in mini_batch:
            old, ref, action, answer = (x[rows] for x in (old_logp, ref_logp, action_id, answer_mask))
            logp, _ = token_logps(model, ids[rows], action, cfg.temperature)
            policy, info = policy_loss(logp, old, advantages[rows], action > 0, cfg.clip, action_tokens)
            kl = kl_penalty(logp, ref, action > 0, action_tokens)
            llds, counts = llds_penalty(logp, old, advantages[rows], action, cfg.llds_gate, answer,
                                        answer_weight, preserved_tokens)
            loss = policy + llds_lambda * llds + (cfg.beta * kl if cfg.beta > 0 else 0)  # v2 eq. 6
            loss.backward()
            total["ratio_max"] = max(total["ratio_max"], info.pop("ratio_max").item())
            for name, value in {"kl": kl, "llds": llds, **info, **counts}.items():
                total[name] += value.item()
        grad_norms.append(update(model, optimizer, scheduler))

    new_logp, updates = all_logps()[0], len(grad_norms)
    return measure(episodes, rewards, advantages, action_id, old_logp, new_logp, entropy, cfg) | {
        "grad_norm": mean([norm for norm in grad_norms if math.isfinite(norm)]),
        "skipped_updates": sum(not math.isfinite(norm) for norm in grad_norms),
        "kl": total["kl"] / updates, "llds": total["llds"] / updates, "answer_weight": answer_weight,
        "ratio_max": total["ratio_max"], "clip_frac": total["clipped"] / is_action.sum().item() / cfg.passes,
        "llds_gate_frac": total["open_units"] / max(1, total["units"]),
        "llds_token_frac": total["penalized_tokens"] / max(1, total["preserved_tokens"]),
    }, (advantages, old_logp, new_logp)

# -------------------------------------------------------------------------------------------------- train
MAY_CHANGE = set("""--retriever_url --rollout_batch --micro_batch_tokens --gradient_checkpointing --save_steps
    --save_total_limit --eval_steps --sample_every --tokens --plot""".split())  # where, how fast, how often

def save_checkpoint(out, model, tok, optimizer, scheduler, history, limit):
    """Writes all that --resume needs, and renames it when complete, so that a kill leaves the one before."""
    unfinished, complete = out / "unfinished", out / f"checkpoint-{len(history)}"
    if not complete.exists():
        model.save_pretrained(unfinished)
        tok.save_pretrained(unfinished)
        torch.save((optimizer.state_dict(), scheduler.state_dict(), history), unfinished / "training.pt")
        unfinished.rename(complete)
        rotate_checkpoints(out, limit)

def load_checkpoint(out, model, optimizer, scheduler):
    """Its inverse, for --resume: takes up the last checkpoint in out, if any. Returns its history."""
    if not (folder := out.exists() and get_last_checkpoint(out)):
        return []
    saved, flags = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), model.config.llds
    changed = {f"--{name}" for name in flags if flags[name] != saved.config.llds.get(name)} - MAY_CHANGE
    check(not changed, f"--resume: {out} was made with other {', '.join(sorted(changed))}")
    *states, history = torch.load(f"{folder}/training.pt", map_location="cpu", weights_only=True)
    for part, state in zip((model, optimizer, scheduler), (saved.state_dict(), *states)):
        part.load_state_dict(state)
    return history

def train(model, start, env, questions, held_out, llds_lambda, stop, out, cfg):
    """One run from the weights `start`: cfg.steps times rollout, then updates; ends early once `stop` is not
    empty. Writes checkpoints, metrics.jsonl and the model to out; returns the metrics, step by step."""
    model.load_state_dict(start)
    model.get_input_embeddings().requires_grad_(not cfg.freeze_embeddings)
    n, shuffle = cfg.questions_per_step, random.Random(cfg.seed)
    epochs = range(math.ceil(cfg.steps * n / len(questions)))  # every question once, then all again
    order = [question for _ in epochs for question in shuffle.sample(questions, len(questions))]
    fused = DEVICE == "cuda"  # AdamW's default there needs room for one more copy of the weights
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=0, fused=fused)
    warm_up = int(cfg.warmup_ratio * cfg.steps * cfg.passes * cfg.mini_batches)
    scheduler = get_scheduler("constant_with_warmup", optimizer, warm_up)
    model.config.llds = asdict(replace(cfg, llds_lambda=[llds_lambda], resume=False, output_dir=""))
    history = load_checkpoint(out, model, optimizer, scheduler)
    model.config.save_pretrained(out)  # with the flags, from the start
    save = partial(save_checkpoint, out, model, env.tok, optimizer, scheduler, history, cfg.save_total_limit)
    for step in range(len(history) + 1, cfg.steps + 1):
        begin, asked = time.perf_counter(), order[(step - 1) * n:step * n]
        torch.manual_seed(hash((cfg.seed, step)))  # a resumed run draws the same numbers
        try:
            episodes = rollout(model, env, asked, cfg.group_size, cfg.temperature)
            sampled = time.perf_counter() - begin
            for e, drawn in zip(episodes, torch.rand(len(episodes)).tolist()):
                e.reward *= drawn >= cfg.reward_noise
            metrics, tensors = train_step(model, start, optimizer, scheduler, episodes, llds_lambda, cfg)
            if metrics["grad_norm"] is None:
                check(False, f"step {step}: no finite gradient; last checkpoint: {get_last_checkpoint(out)}")
            metrics = {"step": step, **metrics, "seconds": time.perf_counter() - begin,
                       "tokens_per_s": metrics["action_tokens"] * len(episodes) / sampled}
            history.append({k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()})
            if step % cfg.eval_steps == 0 or step == cfg.steps:
                history[-1].update(evaluate(model, env, held_out))
        except OSError:  # the retrieval server is gone; a step that only lacks its evaluation is kept
            save()
            raise
        (out / "metrics.tmp").write_text("".join(json.dumps(row) + "\n" for row in history))
        (out / "metrics.tmp").replace(out / "metrics.jsonl")  # so that a kill leaves no half line
        shown = [name for name in STEP_LINE if history[-1].get(name) is not None]
        print(f"step {step:4}", *(f" {name} {history[-1][name]:6.3f}" for name in shown), flush=True)
        if step % cfg.sample_every == 0:
            show(env, episodes[0])
            if cfg.tokens:
                show_tokens(env, episodes[0], *tensors, metrics["answer_weight"])
        if step % cfg.save_steps == 0 or step == cfg.steps or stop:
            save()
            check(not stop, f"stopped after step {step}; --resume goes on from there")
    model.save_pretrained(out)
    env.tok.save_pretrained(out)
    return history

def probe(model, env, questions, cfg):
    """v2 eq. 3: what GRPO on one question alone does to the likelihood of its right responses, always from
    the same weights: one update, where LLDS is silent; then --passes updates, without and with LLDS."""
    asked = random.sample(questions, min(cfg.probe, len(questions)))
    episodes = rollout(model, env, asked, cfg.group_size, cfg.temperature)
    initial = snapshot(model)
    groups = [episodes[i:i + cfg.group_size] for i in range(0, len(episodes), cfg.group_size)]
    groups = [group for group in groups if len({e.reward for e in group}) == 2]
    for passes, llds_lambda in sorted({(1, 0.0), *((cfg.passes, x) for x in (0.0, *cfg.llds_lambda))}):
        changes, alone = [], replace(cfg, mini_batches=1, passes=passes, beta=0.0)
        for group in groups:
            optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=0)
            _, (advantages, old_logp, new_logp) = train_step(
                model, None, optimizer, get_scheduler("constant", optimizer), group, llds_lambda, alone)
            changes.append((new_logp - old_logp)[advantages > 0].sum(dim=1).mean().item())
            model.load_state_dict(initial)
        print(f"\nupdates {passes}, lambda {llds_lambda:g}: {sum(change < 0 for change in changes)} of "
              f"{len(groups)} questions lowered the likelihood of their right responses; in nats:")
        for change in sorted(changes):
            print(f"{change:9.3f} " + "#" * math.ceil(40 * abs(change) / (max(map(abs, changes)) or 1)))

# ------------------------------------------------------------------------------------------------ reports
SIGNS = dict(logp_correct=1.5, entropy=1.5, grad_norm=2.0, reward=0.75)  # > 1: times start; < 1: times best
CURVES = ("eval_em", "reward", "logp_correct", "displaced", "entropy", "grad_norm")
BENCHMARKS = {"general": "nq triviaqa popqa", "multi_hop": "hotpotqa 2wikimultihopqa musique bamboogle"}
BENCHMARKS["average"] = " ".join(BENCHMARKS.values())
STEP_LINE = "reward logp_correct logp_wrong entropy displaced grad_norm llds searches seconds eval_em".split()

def first_action_match(episodes, group_size):
    """Share of wrong responses, in groups with a right one, whose first search found what a right one did."""
    matches = []
    for i in range(0, len(episodes), group_size):
        group = episodes[i:i + group_size]
        found = [e.searches[:1] for e in group if e.reward]
        matches += [e.searches[:1] in found and e.searches != [] for e in group if found and not e.reward]
    return mean(matches)

def measure(episodes, rewards, advantages, action_id, old_logp, new_logp, entropy, cfg):
    """What a round of rollouts was like, and what its updates did to right responses: {name: number}."""
    is_action, right = action_id > 0, (rewards == 1)[:, None]                           # (N, T), (N, 1)
    served = torch.tensor([[len(e.searches)] for e in episodes], device=DEVICE)         # (N, 1)
    tokens, per_token = is_action.sum().item(), lambda mask: mean(old_logp[is_action & mask].tolist())
    return {
        "reward": mean(rewards.tolist()), "searches": mean([len(e.searches) for e in episodes]),
        "logp_correct": per_token(right), "logp_wrong": per_token(~right),
        **{f"logp_action{k}": per_token(right & (action_id == k)) for k in (1, 2)},
        **{f"logp_{n}searches": per_token(served == n) for n in range(cfg.max_turns + 1)},
        "displaced": mean(((new_logp - old_logp)[rewards == 1].sum(dim=1) < 0).tolist()),  # share that fell
        "first_action_match": first_action_match(episodes, cfg.group_size),
        "entropy": entropy.sum().item() / tokens, "action_tokens": tokens / len(episodes),
        "valid_actions": sum(len(e.searches) + (e.answer_start is not None) for e in episodes)
                         / sum(e.turn for e in episodes),
        "zero_std_groups": mean((advantages == 0).view(-1, cfg.group_size).all(dim=1).tolist()),
    }

def evaluate(model, env, questions):
    """Greedy episodes -> exact match and searches a question: of all, by hops and, if several, by set."""
    scores = defaultdict(list)
    for e in rollout(model, env, questions, temperature=0.0):
        hops, name = e.question.get("hops"), e.question.get("set")
        for part in [""] + ([f"_{hops}hop"] if hops else []) + ([f"_{name}"] if name else []):
            scores["em" + part].append(e.reward)
            scores["searches" + part].append(len(e.searches))
    for average, names in BENCHMARKS.items():  # over sets, each counting the same, as in the paper
        of_sets = [scores.get(f"em_{name}") for name in names.split()]
        if all(of_sets):
            scores["em_" + average] = [*map(mean, of_sets)]
    return {f"eval_{name}": mean(scores[name]) for name in sorted(scores)}

def show(env, e):
    """Prints an episode, its tags in colour on a terminal."""
    colours = {"think": 2, "search": 36, "information": 33, "answer": 32 if e.reward else 31}
    paint = lambda tag: f"\033[{colours.get(tag[1], 0)}m{tag[0]}\033[0m" if sys.stdout.isatty() else tag[0]
    print(e.question["question"], f"-> reward {e.reward:g}" if e.question["golden_answers"] else "")
    print(re.sub(r"<(\w+)>.*?(</\1>|$)", paint, env.decode(e.ids[e.action_id.index(1):]), flags=re.DOTALL))

def show_tokens(env, e, advantages, old_logp, new_logp, answer_weight):
    """Prints the first episode of a step: what each token is, and its penalty after the updates."""
    (ids, action, answer), advantage = pad([e]), advantages[:1]                         # (1, T) each, (1,)
    old, new = old_logp[:1, :len(e.ids)], new_logp[:1, :len(e.ids)].requires_grad_()
    llds, _ = llds_penalty(new, old, advantage, action, env.cfg.llds_gate, answer, answer_weight, denom=1)
    llds.backward()  # where a token fell, the gradient is -gate * answer_weight
    columns = dict(id=ids, action=action, answer=answer, advantage=advantage * (action > 0), old_logp=old,
                   new_logp=new, weight=new.grad.abs(), penalty=(old - new).relu() * new.grad.abs())
    table = pandas.DataFrame({name: column[0].tolist() for name, column in columns.items()})
    table["text"] = [repr(env.decode([i])) for i in e.ids]
    print(table.to_string(index=False, float_format="%.4f"))

def sparkline(values):
    """Numbers as a line of at most 60 characters."""
    values, low, high = values[::math.ceil(len(values) / 60)], min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (value - low) / (high - low or 1))] for value in values)

def crossings(history):
    """{name: step at which a series first showed its sign of trouble}; a heuristic of ours, see SIGNS."""
    crossed, table = {}, pandas.DataFrame(history, columns=["step", *SIGNS]).set_index("step")
    for name, factor in SIGNS.items():
        means = table[name].astype(float).abs().dropna().rolling(5).mean().dropna()
        sign = means < factor * means.cummax() if factor < 1 else means > factor * means[:1].sum()
        if sign.any():
            crossed[name] = int(sign.idxmax())
    return crossed

def report(runs, before, plot):
    """Prints what each run began and ended with, and its curves. runs: {lambda: metrics, step by step}."""
    for llds_lambda, history in runs.items():
        print(f"\nlambda {llds_lambda:g}")
        for name in CURVES:
            if values := [row[name] for row in history if row.get(name) is not None]:
                print(f"  {name:13}{values[0]:8.3f} ->{values[-1]:8.3f}  {sparkline(values)}")
        crossed, end = crossings(history), len(history) + 1
        decay = min(crossed.get("logp_correct", end), crossed.get("entropy", end))
        fall = max(decay, crossed.get("reward", end))
        spans = ("I stagnation", 1, decay), ("II decay", decay, fall), ("III acceleration", fall, end)
        spans = [f"{name}: steps {begin} to {after - 1}" for name, begin, after in spans if begin < after]
        print("  phases:", ", ".join(spans), "  first signs:", crossed or "none")
    ends = {f"lambda {llds_lambda:g}": rows[-1] for llds_lambda, rows in runs.items() if rows}
    print("\nheld-out questions")
    print(pandas.DataFrame({"start": before, **ends}).loc[[*before]].to_string(float_format="%.3f"))
    if plot:
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
        for llds_lambda, history in runs.items():
            table = pandas.DataFrame(history, columns=["step", *CURVES]).set_index("step").astype(float)
            for axis, name in zip(axes.flat, CURVES):
                table[name].dropna().plot(ax=axis, title=name, label=f"lambda {llds_lambda:g}")
        axes.flat[0].legend()
        figure.savefig(plot)

# -------------------------------------------------------------------------------- questions, models, main
def load_questions(sources, part):
    """Questions of one set, or of several with commas between: a file (json, jsonl, parquet), a corpus (its
    questions of split `part`) or NAME on the hub, each perhaps with :CONFIG or :CONFIG:SPLIT, such as
    x.jsonl::train[:1000]. Returns dicts with "question" and "golden_answers"; "set" if there are several."""
    questions = []
    for source in sources.split(","):
        name, config, split = (source.split(":", 2) + ["", ""])[:3]
        kind = next((kind for kind in ("json", "parquet") if f".{kind}" in name), None)  # also .jsonl.gz
        try:
            rows = (load_dataset(kind, data_files=name, split=split or "train") if kind else
                    load_dataset(name, config or None, split=split or part)).to_list()
            if "questions" in rows[0]:
                rows = [q for row in rows for q in row["questions"] or () if q.get("split") == part]
            for row in rows:
                if theirs := row.get("reward_model"):  # as Search-R1 keeps them
                    row["golden_answers"] = row.get("golden_answers") or theirs["ground_truth"]["target"]
                    row["question"] = row.get("question") or row["prompt"][-1]["content"]
                if "," in sources or row.get("data_source"):
                    row["set"] = row.get("data_source") or config or Path(name).name.partition(".")[0]
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, StopIteration,
                exceptions.DatasetsError) as error:
            check(False, f"{source}: cannot be read. {error!r}")
        check(rows and all(isinstance(row.get("question"), str) and isinstance(row.get("prompt") or [], list)
                           and isinstance(row.get("golden_answers"), list)
                           and {str}.issuperset(map(type, row["golden_answers"])) for row in rows),
              f"{source}: '{part}' needs questions, with 'question' and a list of strings, 'golden_answers'")
        check(rows[0].get("set") not in [q.get("set") for q in questions], f"{source}: two sets of one name")
        questions += rows
    return questions

def load_model(cfg, passages, questions):
    """(tokenizer, model) of --model: from hub or disk, or the built-in ones, which know the corpus' words."""
    if cfg.model == "tiny":
        tok, model = tiny_agent(passages, questions, cfg.top_k)
    else:
        model = AutoModelForCausalLM.from_pretrained(cfg.model, attn_implementation="sdpa", dtype="float32")
        odd = {"sliding_window", "logits_scaling", "logit_scale", "final_logit_softcapping"}
        odd = {key for key in odd if getattr(model.config, key, None)}
        odd |= set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        check(not odd and hasattr(model.base_model, "layers"),
              f"--model {cfg.model}: only models built like Qwen2 or Llama; {', '.join(odd) or 'no .layers'}")
        # AutoTokenizer goes by the model's type: for our saved agent it would take Qwen2's, with other ids.
        ours = getattr(model.config, "tokenizer_class", None) == "PreTrainedTokenizerFast"
        tok = (PreTrainedTokenizerFast if ours else AutoTokenizer).from_pretrained(cfg.model)
    for layer in model.base_model.layers if cfg.gradient_checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return tok, model.to(DEVICE).eval()  # eval, always: no dropout

def warm_start(model, env, passages, questions, cfg):
    """Supervised steps on the actions of scripted episodes, so that GRPO's model knows the format."""
    check(not cfg.warm_steps or all(q.get("path") for q in questions), "--warm_steps: no 'path' in questions")
    optimizer = torch.optim.AdamW(model.parameters(), cfg.warm_learning_rate, (0.9, 0.98), weight_decay=0)
    scheduler = get_scheduler("linear", optimizer, cfg.warm_steps // 10, cfg.warm_steps)
    batches = lessons(env, passages, questions, cfg.warm_steps)
    for episodes in tqdm(batches, "warm start", cfg.warm_steps, leave=False):
        ids, action_id, _ = pad(episodes)
        for rows in split([len(e.ids) for e in episodes], 1, 1, cfg.micro_batch_tokens)[0]:
            logp, _ = token_logps(model, ids[rows], action_id[rows])
            (-logp.sum() / (action_id > 0).sum()).backward()
        update(model, optimizer, scheduler)

def run(cfg):
    try:
        passages, no_training = load_corpus(cfg.corpus), cfg.model != "tiny" and (cfg.eval or cfg.ask)
        questions = [] if no_training else load_questions(cfg.train_data or cfg.corpus, "train")
        held_out = [] if cfg.ask else load_questions(cfg.eval_data or cfg.corpus, "test")
        everything = questions + held_out
        tok, model = load_model(cfg, passages, everything)
        retriever = HTTPRetriever(cfg.retriever_url) if cfg.retriever_url else BM25(passages)
        env = Environment(tok, retriever, cfg, model.config.max_position_embeddings)
    except ValueError as error:  # of a corpus or a model: a sentence; later ones are bugs
        check(False, error)
    if cfg.ask:
        return show(env, *rollout(model, env, [{"question": cfg.ask, "golden_answers": []}], temperature=0.0))
    if cfg.hops:
        questions, held_out = ([q for q in qs if q.get("hops") == cfg.hops] for qs in (questions, held_out))
        check((questions or no_training) and held_out, f"--hops {cfg.hops} leaves no questions")
    out = Path(cfg.output_dir or time.strftime(f"runs/{Path(cfg.model).name}-%y%m%d-%H%M%S"))
    check(cfg.eval or cfg.probe or cfg.resume or not any(out.glob("*")), f"--output_dir {out} is not empty")
    if not cfg.probe:
        out.mkdir(parents=True, exist_ok=True)
    warm_start(model, env, passages, everything, cfg)
    if cfg.probe:
        return probe(model, env, questions, cfg)
    before = evaluate(model, env, held_out)
    if cfg.eval:
        names = "model eval_data top_k max_turns max_new_tokens max_feedback_tokens".split()
        settings = {name: vars(cfg)[name] for name in names} | {"corpus": cfg.retriever_url or cfg.corpus}
        settings |= {"decoding": "greedy", "questions": Counter(q.get("set", "all") for q in held_out)}
        (out / "eval.json").write_text(json.dumps(before | settings, indent=1) + "\n")
        return print(pandas.Series(before | settings).to_string())
    stop = []  # Ctrl-C and SIGTERM let the step end; the second one ends the program
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number) or signal.signal(number, signal.SIG_DFL))
    start, runs = snapshot(model), {}
    for llds_lambda in cfg.llds_lambda:
        folder = out / f"lambda_{llds_lambda:g}" if len(cfg.llds_lambda) > 1 else out
        print(f"\nlambda {llds_lambda:g}: {folder}")
        runs[llds_lambda] = train(model, start, env, questions, held_out, llds_lambda, stop, folder, cfg)
    report(runs, before, cfg.plot and out / "curves.png")

def main(argv=None):
    cfg = parse_config(argv)
    set_seed(cfg.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and each token brings another
    try:  # weights stay float32: a bfloat16 one would swallow an update of 1e-6. A cache would hold old casts
        with torch.autocast(DEVICE, torch.bfloat16, cfg.dtype == "bfloat16", cache_enabled=False):
            run(cfg)
    except OSError as error:  # a file, a model, or the retrieval server
        check(False, error)
    except torch.OutOfMemoryError as error:
        check(False, f"{error} Lower --micro_batch_tokens, --rollout_batch; add --gradient_checkpointing")

if __name__ == "__main__":
    main()
