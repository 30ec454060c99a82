# SPDX-License-Identifier: MIT
"""GRPO for a language model that learns to use a search engine, and LLDS, which keeps it alive.
    python llds.py                                       a tiny built-in agent, offline, on a CPU
    python llds.py --model Qwen/Qwen2.5-0.5B-Instruct    the same code with a real model, on one GPU
The game. The model gets a question and writes an *action*, token by token. If that ends in
<search> a query </search>, the program searches, appends the passages as *feedback*, and the model
goes on with its next action. If it ends in <answer> an answer </answer>, the *episode* is over: its
reward is 1 for a right answer, else 0. An action with its feedback is a *turn*. All actions of an
episode are its *response*. Only they are trained; action_id says which token belongs to which:
    tokens       prompt       action 1       feedback       action 2
    action_id    0 0 0 0      1 1 1 1 1      0 0 0 0 0      2 2 2 2          0: not trained
GRPO. Several episodes of one question are a *group*. A response's advantage A says how much better
than its group it did; each of its tokens gets that A. A *step* plays new episodes (the *rollout*)
and makes several *updates* with them, each on a *mini-batch* of whole groups:
    episodes = rollout(model, questions)
    old_logp = log-probabilities of the tokens in actions, under the weights that sampled them
    num_iterations times, for each mini-batch:
        logp = the same log-probabilities under the present weights
        loss = policy_loss(logp, old_logp, A) + lambda * llds_penalty(logp, old_logp, A)
        loss.backward(); optimizer.step()
The trouble. GRPO makes the tokens of wrong responses (A < 0) less likely. These often share much
with right ones, such as the first search. What they share gets its likelihood from the same weights
in nearly the same hidden states: pushed down in wrong responses, it goes down in right ones, too.
Those push it up again; but where wrong ones are many, or unlikely already, they win. Right ones
lose likelihood though the loss asks for more: lazy likelihood displacement. It can end in collapse.
The cure. LLDS penalises max(0, old_logp - logp), what a token has lost since it was sampled, in
responses no worse than their group (A >= 0), while the response as a whole has lost likelihood;
this condition is the *gate*. At a step's first update nothing has changed, and the penalty is 0.
Paper: arXiv 2512.04220, v1 and v2 are its versions; it builds on Search-R1. Shapes: N responses, T
tokens in the longest, M tokens in all actions, D numbers in a hidden state, V words known."""
import copy, itertools, json, os, random, re, sys, time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
import torch, torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as states
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, Cache, HfArgumentParser,
                          PreTrainedTokenizerFast, set_seed)
from retriever import (BM25, CLOSE, CORRECTION, OPEN, PROMPT, TAG, ErringRetriever, HTTPRetriever,
                       check_folder, check_lessons, clean, exact_match, format_passages,
                       keep_fitting, lessons, load_corpus, load_questions, show, text_in_tag,
                       tiny_agent)
from retriever import blame, check, stop  # each ends the program with one sentence
GPU, DEVICE = torch.cuda.is_available(), "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if GPU and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
with blame("RANK or WORLD_SIZE, which torchrun sets"):
    RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
# ------------------------------------------- losses: they need torch alone; copy from here ...
def group_advantages(rewards, group_size):
    """How much better than its group a response is: A = (r - mean) / (std + 1e-6) (v2 eq. 1; sample
    std and 1e-6 as in the authors' code). rewards: (N,), a group's side by side. Returns (N,)."""
    groups = rewards.float().view(-1, group_size)                # (N / group_size, group_size)
    std, mean = torch.std_mean(groups, dim=1, keepdim=True)
    # Equal rewards give exactly 0. Rounding could make A negative; LLDS would skip the group.
    lowest, highest = groups.aminmax(dim=1, keepdim=True)
    return torch.where(lowest < highest, (groups - mean) / (std + 1e-6), 0.0).view(-1)
def action_ids(mask):
    """Numbers the actions in a 0/1 mask, for trainers that have only a mask (this file numbers them
    as they are sampled). (N, T) -> (N, T): [0, 1, 1, 0, 1] -> [0, 1, 1, 0, 2]."""
    mask = mask.long()
    begins = mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)) == 1  # a 1 that follows a 0
    return begins.cumsum(dim=1) * mask
def masked_mean(x, mask, denom=None):
    """Mean of x where mask is 1, both (N, T). denom replaces the number of ones: with that of the
    whole mini-batch, the results of its micro-batches add up to its mean."""
    return (x * mask).sum() / max(1, mask.sum() if denom is None else denom)
def policy_loss(logp, old_logp, advantages, mask, clip=0.2, denom=None):
    """GRPO's clipped objective with masked feedback (v2 eq. 1), as a mean over tokens like the
    authors' code. logp, old_logp, mask: (N, T). advantages: (N,), else RuntimeError.
    Returns (loss, {"clipped": number of tokens left without gradient})."""
    mask, advantages = mask.bool(), advantages.view(len(logp), 1)
    # The mask comes before exp(): other trainers leave anything outside actions, even inf.
    log_ratio = (logp - old_logp.detach()).masked_fill(~mask, 0)                        # (N, T)
    ratio = log_ratio.clamp(max=20).exp()  # the clamp is verl's: exp(89) would be inf
    # Where A > 0 and ratio > 1 + clip, or A < 0 and ratio < 1 - clip, min() takes the clipped
    # value, a constant: no gradient. Elsewhere it takes the free one, also to undo a change.
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.min(free, clipped), mask, denom)
    return loss, {"clipped": (clipped < free).sum()}
def kl_penalty(logp, ref_logp, mask, denom=None):
    """KL divergence from the initial model, as a mean over tokens of Schulman's estimate "k3":
    exp(r) - r - 1 with r = ref_logp - logp, which is never negative. All (N, T)."""
    r = (ref_logp.detach() - logp).masked_fill(~mask.bool(), 0).clamp(max=20)
    return masked_mean(r.exp() - r - 1, mask, denom)
def llds_penalty(logp, old_logp, advantages, action_id, gate="response", answer_mask=None,
                 answer_weight=1.0, denom=None):
    """LLDS: the mean of gate * max(0, old_logp - logp) over all action tokens of good responses.
    >>> old_logp = torch.tensor([[-4., -4., -4.]])               # a right response of three tokens
    >>> advantages, action_id = torch.tensor([1.]), torch.tensor([[1, 1, 1]])
    >>> fallen = torch.tensor([[-7., -4., -3.]])                 # it lost 3, 0 and -1: fell by 2
    >>> llds_penalty(fallen, old_logp, advantages, action_id)[0] # the gate is open: (3 + 0 + 0) / 3
    tensor(1.)
    >>> risen = torch.tensor([[-7., -4., 0.]])                   # it lost 3, 0 and -4: rose by 1
    >>> llds_penalty(risen, old_logp, advantages, action_id)[0]  # the gate is closed
    tensor(0.)

    logp, old_logp: (N, T), of the present weights and of those that sampled.
    advantages: (N,). Good is A >= 0: no worse than its group, even if all of it is wrong.
    action_id: (N, T), k on the tokens of the k-th action, 0 elsewhere.
    gate: 1 for a unit that has lost likelihood in sum, else 0. The unit is a "token" (v2 eq. 9), a
        "response" (v1; v2 eq. 10) or an "action" (v2 eq. 4).
    answer_mask: (N, T), the final answer's tokens. answer_weight: 0 to 1, times their penalty; the
        gate sees them in full. Below 1 this is LLDS-MA, "masked answer" (v1: 0; v2 eq. 5).
    Returns (loss, {"units": number of good units, "open_units": of those with gate 1}). ValueError:
        gate or answer_weight; RuntimeError: shape of advantages."""
    if gate not in ("token", "response", "action") or not 0 <= answer_weight <= 1:
        raise ValueError(f"unknown gate {gate!r}, or answer_weight {answer_weight} not in [0, 1]")
    preserved = (action_id > 0) & (advantages.view(len(logp), 1) >= 0)                  # (N, T)
    lost = (old_logp.detach() - logp).masked_fill(~preserved, 0)                        # (N, T)
    change = lost.detach().float()  # for the gate, through which no gradient flows
    if gate == "token":
        units, fallen = preserved, change > 0                                           # (N, T)
        is_open = fallen
    elif gate == "response":
        units, fallen = preserved.any(dim=1), change.sum(dim=1) > 0                     # (N,)
        is_open = fallen[:, None]  # for all tokens of a row
    else:
        k = torch.arange(1, int(action_id.max()) + 1, device=logp.device)  # K actions
        members = preserved[..., None] & (action_id[..., None] == k)                    # (N, T, K)
        units = members.any(dim=1)                                                      # (N, K)
        fallen = (change[..., None] * members).sum(dim=1) > 0                           # (N, K)
        is_open = (members & fallen[:, None]).any(dim=2)                                # (N, T)
    penalty = torch.relu(lost) * is_open  # relu, as clamp has gradient 1 where exactly 0 was lost
    if answer_weight != 1:
        penalty = penalty * torch.where(answer_mask.bool(), answer_weight, 1.0)
    loss = masked_mean(penalty, preserved, denom)
    return loss, {"units": units.sum(), "open_units": fallen.sum()}
# -------------------------------------------------------------------- ... copy to here. Settings
def flag(default, help):
    return field(default=default, metadata={"help": help})
@dataclass
class Config:
    """Every flag. These defaults suit the built-in agent; PRESETS has what other runs change."""
    # Model and data
    model: str = flag("tiny", "'tiny' (built in), a hub id, or a save_pretrained folder: runs/x")
    preset: Literal["auto", "tiny", "real", "collapse"] = flag("auto", "auto: by --model")
    corpus: str = flag(str(Path(__file__).with_name("tiny_corpus.jsonl")), "passages, jsonl[.gz]")
    retriever_url: str = flag("", "search there, as Search-R1 does: http://HOST:8000/retrieve")
    train_data: str = flag("", "questions: SET[,SET...], see load_questions; default: --corpus")
    eval_data: str = flag("", "held-out questions, in the same form; each set has its own score")
    hops: int = flag(0, "train and evaluate on questions that need so many searches; 0: on all")
    retrieval_noise: float = flag(0.0, "chance that a search in training finds something else")
    # An episode
    prompt: str = flag("{question}", "for questions that bring no prompt of their own")
    max_turns: int = flag(3, "turns in which a search is served; one more follows, for the answer")
    top_k: int = flag(3, "passages that a search returns")
    max_new_tokens: int = flag(40, "most tokens of an action")
    max_feedback_tokens: int = flag(120, "most tokens of feedback; the text is cut, not the tag")
    temperature: float = flag(1.0, "of sampling and of all log-probabilities; evaluation is greedy")
    # A step and its updates
    steps: int = flag(40, "steps: each makes a rollout, then num_iterations * mini_batches updates")
    questions_per_step: int = flag(16, "questions, and so groups, in a step")
    group_size: int = flag(8, "episodes of one question; their mean reward is the baseline")
    mini_batches: int = flag(4, "equal parts of a step's groups; an update each, in each iteration")
    num_iterations: int = flag(1, "times that a step's episodes are used for updates, as in TRL")
    learning_rate: float = flag(5e-4, "of AdamW, constant after the warm-up")
    warmup_ratio: float = flag(0.1, "share of the updates in which the learning rate rises from 0")
    clip: float = flag(0.2, "how far a token's ratio may move from 1 before its gradient stops")
    beta: float = flag(0.0, "weight of the KL divergence from the initial model")
    freeze_embeddings: bool = flag(False, "leave embeddings, and a head tied to them, as they are")
    # LLDS
    llds_lambda: list[float] = field(default_factory=lambda: [0.1], metadata={
        "help": "weight of LLDS; several: a run each, from one start"})
    llds_gate: Literal["token", "response", "action"] = flag("response", "what must have fallen")
    answer_weight: float = flag(1.0, "of the final answer's tokens in LLDS (below 1: LLDS-MA)")
    adaptive_answer_weight: bool = flag(False, "in its place: mean searches / 2, at most 1 (v2)")
    # The warm start: supervised learning from scripted episodes, before GRPO
    warm_steps: int = flag(800, "supervised steps")
    warm_learning_rate: float = flag(4e-3, "of these steps, falling to 0")
    early_answers: float = flag(0.6, "share of two-hop scripts (see lessons) that search once")
    # Memory and speed
    rollout_batch: int = flag(256, "episodes that share the KV cache at a time")
    micro_batch_size: int = flag(8, "episodes in one forward and backward pass")
    dtype: Literal["float32", "bfloat16"] = flag(DTYPE, "of matrix products; weights are float32")
    gradient_checkpointing: bool = flag(GPU, "keep the layers' inputs, compute the rest again")
    cpu_offload: bool = flag(False, "weights, gradients, moments in the CPU's memory: 7B on a card")
    # The run
    seed: int = flag(0, "of the weights, the order of the questions and the sampling")
    output_dir: str = flag("", "folder of a new run; default: runs/<model>-<time>")
    save_steps: int = flag(10, "steps between two checkpoints")
    eval_steps: int = flag(10, "steps between two evaluations on held-out questions")
    resume: str = flag("", "go on with the run in this folder, with its flags and those given here")
    eval: bool = flag(False, "evaluate --model on each set of --eval_data")
    ask: str = flag("", "answer this question with --model")

PRESETS = {
    "real": dict(  # Search-R1's setting, with shorter texts and 32 of its 512 questions a step
        prompt=PROMPT, max_new_tokens=300, max_feedback_tokens=500, steps=200, group_size=5,
        questions_per_step=32, mini_batches=8, learning_rate=1e-6, warmup_ratio=0.285, beta=0.001,
        rollout_batch=80, micro_batch_size=5, warm_steps=0, warm_learning_rate=1e-5),
    "collapse": dict(  # GRPO alone loses what it knew, LLDS goes on learning
        hops=2, max_turns=5,  # two searches are needed, and there is room to search again
        retrieval_noise=0.25,  # responses that search rightly and are wrong by bad luck
        early_answers=0.3,  # it begins with something to lose: it searches twice
        freeze_embeddings=True,  # what words mean stays; what is lost is how to use them
        mini_batches=8, num_iterations=3,  # 24 updates a step: time to drift away from old_logp
        learning_rate=3e-4, steps=120)}
# Lowest and highest value. Other counts: 1 to a billion; other numbers: 0 to a billion.
RANGES = dict(steps=(0, 1e12), warm_steps=(0, 1e9), seed=(0, 1e9), hops=(0, 9), group_size=(2, 1e6),
              max_feedback_tokens=(32, 1e6), temperature=(1e-3, 1e9), retrieval_noise=(0, 1),
              early_answers=(0, 1), warmup_ratio=(0, 1), answer_weight=(0, 1))
FIXED = "model preset llds_lambda seed output_dir eval ask".split()  # when a run is resumed
def parse_config(argv=None):
    """Command line -> Config. What is typed replaces what a run has saved, and this the preset."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(Config, allow_abbrev=False)
    parser.error = stop
    # A first look, since --model, --preset and --resume decide the defaults of the others.
    typed, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    by_model = "tiny" if typed.model == "tiny" else "real"
    preset = by_model if typed.preset == "auto" else typed.preset
    parser.set_defaults(**PRESETS.get(preset, {}))  # those of tiny are the defaults
    saved, path = [], Path(typed.resume or typed.model, "flags.json")
    if typed.resume or (typed.model != "tiny" and typed.preset == "auto" and path.exists()):
        with blame(path):
            for name, value in json.loads(path.read_text(encoding="utf-8")).items():
                saved += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        saved += [] if typed.resume else ["--warm_steps", "0"]  # --model had its warm start
    parser.error = lambda message: stop(f"{path}: {message}")
    as_saved = vars(parser.parse_args(saved))
    parser.error = stop
    cfg = Config(**vars(parser.parse_args(saved + argv)))  # what comes later wins
    for name, value in vars(cfg).items():
        fixed = cfg.resume and name in FIXED
        check(not fixed or value == as_saved[name], f"--resume: no other --{name} beside it")
        for number in value if isinstance(value, list) else [value]:
            lowest, highest = RANGES.get(name, (1 if type(number) is int else 0, 1e9))
            check(type(number) not in (int, float) or lowest <= number <= highest,
                  f"--{name} must be from {lowest:g} to {highest:g}, not {number}")
    names, parts = {f"{number:g}" for number in cfg.llds_lambda}, cfg.mini_batches * WORLD
    check(len(names) == len(cfg.llds_lambda), "--llds_lambda: two of the numbers are the same")
    check("{question}" in cfg.prompt, "--prompt must contain {question}")
    asks = cfg.ask.strip() and cfg.model != "tiny"
    check(asks or "--ask" not in argv, "--ask needs a question and a trained --model")
    check(cfg.questions_per_step % parts == 0,
          f"--questions_per_step must be a multiple of {parts}, --mini_batches times processes")
    if any(cfg.llds_lambda) and cfg.mini_batches * cfg.num_iterations == 1:
        print("WARNING: LLDS is 0: mini_batches * num_iterations is 1", file=sys.stderr)
    return cfg
# ---------------------------------------------------- episode: prompt, actions, feedback, reward
@dataclass
class Episode:
    """A question and what followed. What was sampled is never decoded and encoded again."""
    question: dict             # "question", "golden_answers", "set", perhaps "prompt", "hops"
    ids: list                  # prompt ...   action 1 ...   feedback ...   action 2 ...
    action_id: list            # 0 0 0 0 0    1 1 1 1 1 1    0 0 0 0 0 0    2 2 2 2 2 2
    action_start: int          # ids[action_start:] is the current action
    turn: int = 1
    searches: list = field(default_factory=list)  # for each served search the texts it found
    answer_start: int | None = None  # ids[answer_start:] is the final answer, with its tags
    reward: float = 0.0
    done: bool = False
    sampled_logp: list = field(default_factory=list, compare=False)  # of each sampled token
    cached: int = field(default=0, compare=False)  # ids[:cached] are in the rollout's KV cache
class Environment:
    """Where text and ids meet. A new tool needs its closing tag in complete(), what it does in
    respond(), and its tags in retriever.py's PROMPT, CORRECTION and TAG."""
    def __init__(self, tok, retriever, cfg, eos_ids=()):
        self.tok, self.retriever, self.cfg = tok, retriever, cfg
        tok.clean_up_tokenization_spaces = False  # decode() shall give all that was written
        self.eos_ids = {tok.eos_token_id, *eos_ids}  # each of them ends an action
        # Text from outside may hold no special tokens, but for our tags, if a model has these.
        special = [token.content for token in tok.added_tokens_decoder.values() if token.special]
        self.forbidden = [name for name in special if not TAG.fullmatch(name)]
        turn = cfg.max_new_tokens + cfg.max_feedback_tokens
        self.longest = cfg.max_turns * turn + cfg.max_new_tokens  # tokens that may follow a prompt
    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False)
    def reset(self, question):
        """A new Episode, ready for its first action."""
        tok, text = self.tok, self.cfg.prompt.replace("{question}", question["question"])
        messages = question.get("prompt") or [{"role": "user", "content": text}]
        messages = [m | {"content": clean(m["content"], self.forbidden)} for m in messages]
        ids = tok.encode("\n".join(m["content"] for m in messages))
        if tok.chat_template:
            ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if ids[-1] in self.eos_ids:  # some tokenizers end each text
            ids.pop()
        return Episode(question, ids, action_id=[0] * len(ids), action_start=len(ids))
    def complete(self, e):
        """Is the current action complete: by its length, an end of text, or a closing tag?"""
        action = e.ids[e.action_start:]
        # A tag is seldom one token: "</", "search", ">\n". Of 9 characters, it is in 9 tokens.
        tail, full = self.tok.decode(action[-9:]), len(action) >= self.cfg.max_new_tokens
        return full or action[-1] in self.eos_ids or "</search>" in tail or "</answer>" in tail
    def respond(self, episodes):
        """Runs the action that each of the episodes has completed: ends it, or adds feedback."""
        searching, queries = [], []
        for e in episodes:
            text = self.tok.decode(e.ids[e.action_start:])
            answer, query = text_in_tag("answer", text), text_in_tag("search", text)
            if answer is not None:
                e.done, e.reward = True, exact_match(answer, e.question["golden_answers"])
                e.answer_start = len(e.ids) - 1
                while "<answer>" not in self.tok.decode(e.ids[e.answer_start:]):
                    e.answer_start -= 1  # back to the token in which the tag begins
            elif e.turn > self.cfg.max_turns:  # this turn was for the answer
                e.done = True
            elif query is not None:
                searching.append(e)
                queries.append(query)
            else:
                self.append(e, self.encode(CORRECTION)[:self.cfg.max_feedback_tokens])
        found = self.retriever.search(queries, self.cfg.top_k)  # all in one request
        opening, closing = self.encode(OPEN), self.encode(CLOSE)
        room = self.cfg.max_feedback_tokens - len(opening) - len(closing)
        for e, passages in zip(searching, found):
            text = format_passages(passages)[:100 * room]  # encoding more would only take long
            self.append(e, opening + self.encode(clean(text, self.forbidden))[:room] + closing)
            # For the metrics a search that ErringRetriever spoilt counts as it should have been.
            e.searches.append([hit.get("instead_of", hit["contents"]) for hit in passages])
    def append(self, e, feedback):  # and open the next turn
        e.ids, e.action_id = e.ids + feedback, e.action_id + [0] * len(feedback)
        e.action_start, e.turn = len(e.ids), e.turn + 1
# --------------------------------------------------------------------------------------- rollout
# All episodes of a rollout share one KV cache: a row for each, a cell for each position.
#     cell     0 1 2 3 4 5 6 7 8 9     P prompt, A action, F feedback, . nothing yet
#     row 0    P P P P A A F F A .     Nothing is padded on the left, nothing moves as rows grow,
#     row 1    P P P P A A A A . .     and a token sees the cells up to its own.
# All rows of a pass read as many tokens. One that has fewer reads its last token again: that only
# writes the same into its cell. So the last column of a pass is each row's last token.
class SlotCache(Cache):
    """Keys and values of all rows. feed() sets row_numbers, position, seen_rows, used of a pass."""
    def __init__(self, rows, cells):
        super().__init__(layers=[])
        self.rows, self.cells = rows, cells
        self.buffers = {}  # of each layer: (2, rows, heads, cells, size), keys and values
    def update(self, keys, values, layer, *args, **kwargs):
        """What a layer calls: keeps keys and values, (rows, heads, width, size), returns all."""
        if layer not in self.buffers:  # zeros: what a mask hides is multiplied by 0; 0 * NaN is NaN
            _, heads, _, size = keys.shape
            self.buffers[layer] = values.new_zeros(2, self.rows, heads, self.cells, size)
        for buffer, new in zip(self.buffers[layer], (keys, values)):
            by_cell = buffer.transpose(1, 2)  # a view, (rows, cells, heads, size)
            # Under autocast the rotary embedding makes the keys float32.
            by_cell[self.row_numbers, self.position] = new.transpose(1, 2).to(buffer.dtype)
        return self.buffers[layer][:, self.seen_rows, :, :self.used]
def feed(model, cache, live):
    """One pass: each episode of {row: episode} reads its ids that are not yet in the cache, or its
    last id again. Returns the logits of each one's next token, (rows, V)."""
    ids, position, width = [], [], max(1, max(len(e.ids) - e.cached for e in live.values()))
    for e in live.values():
        last = len(e.ids) - 1
        first = min(e.cached, last)
        position.append([min(t, last) for t in range(first, first + width)])  # the last, repeated
        ids.append([e.ids[t] for t in position[-1]])
        e.cached = len(e.ids)  # true once this pass is over
    ids, position = torch.tensor([ids, position], device=DEVICE)              # (rows, width) each
    cache.position, cache.used = position, max(e.cached for e in live.values())
    cache.row_numbers = torch.tensor(list(live), device=DEVICE)[:, None]                # (rows, 1)
    all_rows = list(live) == list(range(len(live)))  # a slice of the buffers needs no copy
    cache.seen_rows = slice(len(live)) if all_rows else list(live)
    # The mask, (rows, 1, width, used): a token sees the cells up to its own.
    mask = torch.arange(cache.used, device=DEVICE) <= position[:, None, :, None]
    output = model(ids, mask, position, cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float()
def mixed_precision(cfg, keep_casts=False):
    """Products in cfg.dtype; weights stay float32, since bfloat16 would lose small updates."""
    return torch.autocast(DEVICE, torch.bfloat16, cfg.dtype == "bfloat16", cache_enabled=keep_casts)
@torch.no_grad()
def rollout(model, env, questions, group_size=1, temperature=1.0):
    """Plays group_size Episodes of each question; returns them, a group's side by side. Greedy at
    temperature 0. A row whose action is complete waits: its last token is fed again, the sample
    dropped. Once an eighth of the rows wait, they all get feedback, and read it in one pass."""
    model.eval()
    episodes = [env.reset(question) for question in questions for _ in range(group_size)]
    rows = min(env.cfg.rollout_batch, len(episodes))
    cache = SlotCache(rows, env.longest + max(len(e.ids) for e in episodes))
    queue, live, waiting = episodes, [], []  # live[row]: its episode; waiting: row numbers
    with mixed_precision(env.cfg, keep_casts=True):  # of the weights, which do not change here
        while queue or live:
            # 1. Free rows are taken. Rows with a new prompt or feedback read it; logits come in 2.
            free = rows - len(live)
            live, queue = live + queue[:free], queue[free:]
            unread = {row: e for row, e in enumerate(live) if len(e.ids) - e.cached > 1}
            if unread:
                feed(model, cache, unread)
            # 2. Every row is fed its last token (again), and a new one is sampled.
            logits = feed(model, cache, dict(enumerate(live)))                          # (rows, V)
            probs = (logits / (temperature or 1.0)).softmax(dim=1)
            tokens = probs.multinomial(1) if temperature > 0 else logits.argmax(dim=1, keepdim=True)
            logps = probs.gather(1, tokens).log()                                       # (rows, 1)
            sampled = zip(live, tokens[:, 0].tolist(), logps[:, 0].tolist())
            for row, (e, token, logp) in enumerate(sampled):
                if row not in waiting:
                    e.ids.append(token)
                    e.action_id.append(e.turn)
                    e.sampled_logp.append(logp)
                    if env.complete(e):
                        waiting.append(row)
            # 3. Actions are run. The last row replaces one that is done. This goes from the end, so
            #    that of the rows behind it none is done any more.
            if 8 * len(waiting) >= len(live):
                env.respond([live[row] for row in waiting])
                for row in sorted(waiting, reverse=True):
                    if live[row].done:
                        live[row] = live[-1]
                        for buffer in cache.buffers.values():
                            buffer[:, row] = buffer[:, len(live) - 1]
                        live.pop()
                waiting = []
    return episodes
# ---------------------------------------------------------------------------------------- update
def collate(episodes, group_size):
    """ids, action_id, answer_mask: (N, T), padded; rewards, advantages, action_tokens: (N,)."""
    def padded(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(DEVICE)
    batch = SimpleNamespace(ids=padded(e.ids for e in episodes))
    batch.action_id = padded(e.action_id for e in episodes)
    starts = [len(e.ids) if e.answer_start is None else e.answer_start for e in episodes]
    batch.answer_mask = padded([0] * n + [1] * (len(e.ids) - n) for n, e in zip(starts, episodes))
    batch.action_tokens = (batch.action_id > 0).sum(dim=1)
    batch.rewards = torch.tensor([e.reward for e in episodes], device=DEVICE)
    batch.advantages = group_advantages(batch.rewards, group_size)
    return batch
def token_logps(model, ids, action_id, temperature=1.0, chunk=256):
    """Log-probability of each action token under the tempered distribution that sampled it, and the
    entropy of that distribution: (N, T) float32 each, in nats, 0 outside actions.
    ids, action_id: (N, T), padded on the right: no token sees padding, and no mask is needed.
    Logits of all tokens, (N, T, V), would fill the memory. So only hidden states that predict an
    action token meet the LM head, `chunk` at a time, and once more in the backward pass."""
    # The one shift: the hidden state of column t predicts the token of column t + 1.
    row, column = (action_id[:, 1:] > 0).nonzero(as_tuple=True)                         # (M,) each
    needed = max(column.tolist(), default=0) + 1  # columns after it predict no action token
    output = model(input_ids=ids[:, :needed], use_cache=False, output_hidden_states=True,
                   logits_to_keep=1)  # these logits are not used; 1 is the least that can be asked
    hidden, target = output.hidden_states[-1][row, column], ids[row, column + 1]   # (M, D), (M,)
    def head(hidden, target):
        logits = model.get_output_embeddings()(hidden).float()                          # (chunk, V)
        logps = (logits / temperature).log_softmax(dim=1)
        entropy = -(logps.exp() * logps).detach().sum(dim=1)
        return torch.stack([logps.gather(1, target[:, None])[:, 0], entropy])           # (2, chunk)
    chunks = zip(hidden.split(chunk), target.split(chunk))
    parts = [checkpoint(head, *tensors, use_reentrant=False) for tensors in chunks]
    both = torch.zeros(2, *ids.shape, device=ids.device)                                # (2, N, T)
    both[:, row, column + 1] = torch.cat(parts, dim=1)                                  # (2, M)
    return both
@torch.no_grad()
def all_logps(model, batch, micro_batches, temperature):
    """token_logps of a step's rows, (2, N, T), in the micro-batches of its updates. In others they
    would be rounded differently: at the first update logp would not be old_logp, and gates open."""
    both = torch.zeros(2, *batch.ids.shape, device=DEVICE)
    for rows in micro_batches:
        both[:, rows] = token_logps(model, batch.ids[rows], batch.action_id[rows], temperature)
    return both
def split(episodes, cfg):
    """Mini-batches of whole groups, shuffled; each a list of micro-batches, each of row numbers."""
    lengths, mini_batches = torch.tensor([len(e.ids) for e in episodes]), []
    groups = torch.arange(len(episodes)).view(-1, cfg.group_size)
    for some_groups in groups[torch.randperm(len(groups))].tensor_split(cfg.mini_batches):
        rows = some_groups.flatten()
        rows = rows[lengths[rows].argsort()]  # rows of similar length need little padding
        mini_batches.append(rows.split(cfg.micro_batch_size))
    return mini_batches
def adamw(model, betas=(0.9, 0.999)):
    model.state_dict()  # for its effect: FSDP2 lets go of weights that it gathered for a rollout
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=0, fused=True)
def new_learner(model, initial_weights, llds_lambda, cfg):
    """What training changes, at its start. history: a row of metrics for each step."""
    model.load_state_dict(initial_weights)
    model.get_input_embeddings().requires_grad_(not cfg.freeze_embeddings)
    return SimpleNamespace(model=model, optimizer=adamw(model), updates=0, history=[],
                           llds_lambda=llds_lambda, initial_weights=initial_weights)
def train_step(learner, episodes, cfg):
    """A step after its rollout: old log-probabilities, then updates. Returns (metrics, batch)."""
    model, batch = learner.model, collate(episodes, cfg.group_size)
    mini_batches = split(episodes, cfg)
    micro_batches = list(itertools.chain(*mini_batches))
    model.train()  # or layers would not do gradient checkpointing
    with mixed_precision(cfg):
        batch.old_logp, batch.entropy = all_logps(model, batch, micro_batches, cfg.temperature)
        if cfg.beta > 0:  # no second model: ours takes up the initial weights for a moment
            now = copy.deepcopy(model.state_dict())  # there is room: there are no gradients yet
            model.load_state_dict(learner.initial_weights)
            batch.ref_logp, _ = all_logps(model, batch, micro_batches, cfg.temperature)
            model.load_state_dict(now)
            del now
        metrics = rollout_metrics(episodes, batch, cfg)
        gap = metrics["sampler_gap"] or 0.0  # in float32 it is 0, in bfloat16 some 0.04
        says = f"log-probabilities in training are {gap:.2g} off those in the rollout (sampler_gap)"
        check(gap < 0.5 or learner.updates > 0, "--model: this kind is not supported: " + says)
        if gap > 0.1:
            print("WARNING:", says, file=sys.stderr)
        adaptive = min(metrics["searches"] / 2, 1.0)
        metrics["answer_weight"] = adaptive if cfg.adaptive_answer_weight else cfg.answer_weight
        infos, per_step = [], cfg.num_iterations * cfg.mini_batches
        warm_up = int(cfg.warmup_ratio * cfg.steps * per_step)  # updates in which the rate rises
        for _ in range(cfg.num_iterations):
            for mini_batch in mini_batches:
                info = backward(learner, batch, mini_batch, metrics["answer_weight"], cfg)
                rate = cfg.learning_rate * min(1.0, learner.updates / warm_up if warm_up else 1.0)
                info["grad_norm"] = optimizer_step(model, learner.optimizer, rate)
                learner.updates += 1
                infos.append(info)
        new_logp, _ = all_logps(model, batch, micro_batches, cfg.temperature)
    # Displaced: the share of right responses that the updates have made less likely; the loss asks
    # for no such thing. Below 0.001 nats it may be rounding; in bfloat16 much of it is.
    change = (new_logp - batch.old_logp).sum(dim=1)                                     # (N,)
    metrics["displaced"] = mean(change[batch.rewards == 1] < -1e-3)
    return {**metrics, **{name: mean([info[name] for info in infos]) for name in infos[0]}}, batch
def backward(learner, batch, mini_batch, answer_weight, cfg):
    """Gradients of GRPO + lambda * LLDS + beta * KL on a mini-batch (v2 eq. 6). Returns metrics."""
    # Normalisers of the whole mini-batch, on all processes: so micro-batches add up to its mean.
    members = torch.cat(mini_batch)
    lengths, good = batch.action_tokens[members], batch.advantages[members] >= 0
    action_tokens, good_tokens = all_sum(torch.stack([lengths.sum(), lengths[good].sum()]))
    sums = torch.zeros(5, device=DEVICE)
    for rows in mini_batch:
        advantages, action_id = batch.advantages[rows], batch.action_id[rows]
        old_logp, mask = batch.old_logp[rows], action_id > 0
        logp, _ = token_logps(learner.model, batch.ids[rows], action_id, cfg.temperature)
        # Another policy loss, such as GSPO's, goes here; its denom may be another, too.
        policy, counts = policy_loss(logp, old_logp, advantages, mask, cfg.clip, action_tokens)
        llds, gates = llds_penalty(logp, old_logp, advantages, action_id, cfg.llds_gate,
                                   batch.answer_mask[rows], answer_weight, good_tokens)
        kl = torch.zeros_like(llds)
        if cfg.beta > 0:
            kl = kl_penalty(logp, batch.ref_logp[rows], mask, action_tokens)
        loss = policy + learner.llds_lambda * llds + cfg.beta * kl  # the whole method
        (loss * WORLD).backward()  # FSDP2 takes the mean over the processes, and we want the sum
        sums += torch.stack([llds, kl, counts["clipped"], gates["units"], gates["open_units"]]).data
    llds, kl, clipped, units, open_units = all_sum(sums).tolist()
    return {"llds": llds, "kl": kl, "clip_frac": clipped / action_tokens.item(),
            "llds_gate_frac": open_units / max(1, units)}
def optimizer_step(model, optimizer, learning_rate):
    """One update, the gradient cut to norm 1; none if it is not finite. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    if dist.is_initialized():
        norm = norm.full_tensor()  # under FSDP2 each process has a part of it
    optimizer.param_groups[0]["lr"] = learning_rate
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm.item()
# --------------------------------------------------------------------------------------- metrics
def all_sum(x):  # over all processes
    if WORLD > 1:
        dist.all_reduce(x)
    return x
def mean(values):
    """Mean of all processes' values; None (in JSON null) if there are none or it is not finite."""
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    total, count = all_sum(torch.tensor([values.sum(), values.numel()], dtype=torch.float64))
    return (total / count).item() if (total / count).isfinite() else None
def rollout_metrics(episodes, batch, cfg):
    """What a step's episodes are like: {name: number}."""
    acted, right = batch.action_id > 0, (batch.rewards == 1)[:, None]              # (N, T), (N, 1)
    searches = torch.tensor([[len(e.searches)] for e in episodes], device=DEVICE)       # (N, 1)
    sampled = torch.tensor([logp for e in episodes for logp in e.sampled_logp], device=DEVICE)
    gaps = (batch.old_logp[acted] - sampled).abs() if len(sampled) > 0 else []  # both row by row
    parts = {"logp_correct": acted & right, "logp_wrong": acted & ~right}
    parts |= {f"logp_action{k}": (batch.action_id == k) & right for k in (1, 2)}
    parts |= {f"logp_{n}searches": acted & (searches == n) for n in range(cfg.max_turns + 1)}
    return {"reward": mean(batch.rewards), "searches": mean(searches), "sampler_gap": mean(gaps),
            "action_tokens": mean(batch.action_tokens), "entropy": mean(batch.entropy[acted]),
            "first_action_match": first_action_match(episodes, cfg.group_size),
            "zero_std_groups": mean((batch.advantages == 0).view(-1, cfg.group_size).all(dim=1)),
            **{name: mean(batch.old_logp[part]) for name, part in parts.items()}}
def first_action_match(episodes, group_size):
    """Share of wrong responses beside right ones whose first search found the same (v2 fig. 5)."""
    matches = []
    for i in range(0, len(episodes), group_size):
        group = episodes[i:i + group_size]
        found_by_right = [e.searches[0] for e in group if e.reward and e.searches]
        for e in group:
            if e.reward == 0 and any(other.reward for other in group):
                found = e.searches[0] if e.searches else []
                matches.append(found != [] and found in found_by_right)
    return mean(matches)
def evaluate(model, env, questions):
    """Greedy episodes -> exact match and searches: of all, by set, and the average of the sets."""
    episodes, scores = rollout(model, env, questions, temperature=0.0), {}
    parts = {"": episodes}  # end of the metric's name -> its episodes
    for e in episodes:
        if e.question["set"]:
            parts.setdefault("_" + e.question["set"], []).append(e)
    for end, some in sorted(parts.items()):
        scores["eval_em" + end] = mean([e.reward for e in some])
        scores["eval_searches" + end] = mean([len(e.searches) for e in some])
    if len(parts) > 2:
        scores["eval_em_average"] = mean([scores["eval_em" + end] for end in parts if end])
    return scores
CURVES = "eval_em reward logp_correct displaced entropy grad_norm".split()
def report(runs):
    """Prints the curves of each run, at most 60 characters wide. runs: {name: history}."""
    for run, name in itertools.product(runs, CURVES):
        values = [row[name] for row in runs[run] if row.get(name) is not None]
        if values:
            low, span = min(values), max(max(values) - min(values), 1e-9)
            heights = [int(7 * (value - low) / span) for value in values[::len(values) // 60 + 1]]
            curve = "".join("▁▂▃▄▅▆▇█"[height] for height in heights)
            print(f"{run:11}{name:13}{values[0]:7.3f} ->{values[-1]:7.3f} {curve}")
# ---------------------------------------------------------------------- training, a run's folder
def train(learner, noisy_env, env, questions, held_out, folder, cfg):
    """The algorithm: cfg.steps times a rollout in noisy_env, then updates."""
    load_checkpoint(folder, learner)
    history = learner.history
    if not history:
        history.append({"step": 0, **evaluate(learner.model, env, held_out)})
        log_step(folder, history)
    for step in range(history[-1]["step"] + 1, cfg.steps + 1):
        began, last = time.perf_counter(), step == cfg.steps
        draw = random.Random(f"{cfg.seed} {step}")  # a resumed run draws the same, here and below
        pool = questions * (1 + cfg.questions_per_step // len(questions))
        mine = draw.sample(pool, cfg.questions_per_step)[RANK::WORLD]
        torch.manual_seed(10**9 * cfg.seed + 1000 * step + RANK)
        episodes = rollout(learner.model, noisy_env, mine, cfg.group_size, cfg.temperature)
        metrics, _ = train_step(learner, episodes, cfg)
        history.append({"step": step, **metrics, "seconds": time.perf_counter() - began})
        if last or step % cfg.eval_steps == 0:
            show(env, episodes[0])
            history[-1] |= evaluate(learner.model, env, held_out)
        log_step(folder, history)
        if last or step % cfg.save_steps == 0:
            save_checkpoint(folder, learner)
    save_model(learner.model, env.tok, folder)
def write(path, rows):
    """A line of JSON for each row. It is moved into place, so who is killed leaves the old file."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        new.replace(path)
def log_step(folder, history):
    write(folder / "metrics.jsonl", history)
    row, names = history[-1], [*CURVES, "logp_wrong", "llds", "searches", "seconds"]
    shown = [f" {name} {row[name]:6.3f}" for name in names if row.get(name) is not None]
    print(f"step {row['step']:4}", *shown, flush=True)
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all processes' parts
def save_model(model, tok, folder):
    """In the form that from_pretrained() and --model load."""
    weights = states.get_model_state_dict(model, options=WHOLE)
    if RANK == 0:
        model.save_pretrained(folder, state_dict=weights)
        tok.save_pretrained(folder)
def checkpoints(folder):
    """The steps of complete checkpoints. Other names, such as those of copies, are left alone."""
    names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return sorted(int(name[1]) for name in names if name)
def save_checkpoint(folder, learner):
    """A file with what a resumed run needs. It gets its name once it is complete; older ones go."""
    step, unfinished = learner.history[-1]["step"], folder / "unfinished"
    weights, moments = states.get_state_dict(learner.model, learner.optimizer, options=WHOLE)
    if RANK == 0:
        rest = {"updates": learner.updates, "history": learner.history}
        with blame(unfinished):  # a full disk
            torch.save({"weights": weights, "moments": moments, **rest}, unfinished)
        unfinished.rename(folder / f"checkpoint-{step}")
        for older in checkpoints(folder):
            if older < step:
                (folder / f"checkpoint-{older}").unlink()
def load_checkpoint(folder, learner):
    """Takes up the last checkpoint, if there is one, of however many processes."""
    if checkpoints(folder):
        path = folder / f"checkpoint-{checkpoints(folder)[-1]}"
        with blame(path):
            saved = torch.load(path, map_location="cpu", mmap=True)
            weights, moments = saved["weights"], saved["moments"]
            states.set_state_dict(learner.model, learner.optimizer, options=WHOLE,
                                  model_state_dict=weights, optim_state_dict=moments)
            learner.updates, learner.history = saved["updates"], saved["history"]
# ------------------------------------------------------------------------ models, the warm start
def load_model(name, cfg, passages, questions):
    """(tokenizer, model) of a name or folder; 'tiny' is made anew and knows the corpus' words."""
    if name == "tiny":
        tok, model = tiny_agent(passages, questions, cfg.top_k)
    else:
        check_folder(name)
        with blame(f"--model {name}"):
            config = AutoConfig.from_pretrained(name, attention_dropout=0.0)
            # Not AutoTokenizer: it goes by the model's type. Our agent is a Qwen2 of other words.
            tok = PreTrainedTokenizerFast.from_pretrained(name)
            model, info = AutoModelForCausalLM.from_pretrained(name, config=config, dtype="float32",
                attn_implementation="sdpa", output_loading_info=True)
            check(not info["missing_keys"], f"--model {name} lacks {info['missing_keys']}")
    config = model.config
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    layers = {"full_attention", *(getattr(config, "layer_types", None) or [])}
    check(len(layers) == 1 and window >= config.max_position_embeddings,
          f"--model {name}: only full attention is supported, not {layers} or a window of {window}")
    check(len(tok) <= config.vocab_size, f"--model {name}: fewer embeddings than tokens")
    check(all(w.isfinite().all() for w in model.parameters()), f"--model {name}: a weight is NaN")
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = shard(model, cfg) if dist.is_initialized() else model.to(DEVICE)
    return tok, model
def warm_start(model, env, passages, questions, cfg):
    """Supervised steps on the actions of scripted episodes: so the model knows the format."""
    optimizer, steps = adamw(model, betas=(0.9, 0.98)), cfg.warm_steps
    model.train()
    batches = lessons(env, passages, questions, steps)
    for step, episodes in enumerate(tqdm(batches, "warm start", steps, disable=RANK > 0)):
        batch = collate(episodes, len(episodes))  # the same in each process; there are no groups
        ids, action_id = batch.ids[RANK::WORLD], batch.action_id[RANK::WORLD]
        with mixed_precision(cfg):
            logp, _ = token_logps(model, ids, action_id)
        (-logp.sum() / batch.action_tokens.sum() * WORLD).backward()  # WORLD: see backward()
        done = step / steps  # the rate rises in the first tenth, then falls to 0
        optimizer_step(model, optimizer, cfg.warm_learning_rate * min(10 * done, 1 - done))
# --------------------------------------------------------------- several GPUs: torchrun and FSDP2
# Each process has a GPU, plays its share of a step's questions and trains on these. Gradients,
# normalisers and metrics are added up. FSDP2 leaves each process a part of all weights, gradients
# and moments (with --cpu_offload in the CPU's memory), and gathers a layer's weights for use.
def start_processes(cfg):
    """Joins torchrun's processes. For --cpu_offload a single process makes a group of its own."""
    if WORLD > 1 or RANK > 0 or cfg.cpu_offload:
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if RANK < WORLD == 1 else {}
        with blame("RANK or WORLD_SIZE is set, but not by torchrun"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", **alone)
    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
def shard(model, cfg):
    """To gather weights, all processes must make the same pass. They do in updates, as each has as
    many rows, and at a rollout's begin. Then weights stay gathered until a backward pass."""
    policy = fsdp.MixedPrecisionPolicy(getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    offload = fsdp.CPUOffloadPolicy(pin_memory=False) if cfg.cpu_offload else fsdp.OffloadPolicy()
    mesh = dist.init_device_mesh(DEVICE, (WORLD,))
    for part in [*model.base_model.layers, model]:
        fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy,
                         offload_policy=offload)
    return model
# ------------------------------------------------------------------------------------------ main
def run(cfg):
    start_processes(cfg)
    set_seed(cfg.seed)
    passages = load_corpus(cfg.corpus)
    retriever = HTTPRetriever(cfg.retriever_url).probe() if cfg.retriever_url else BM25(passages)
    held_out = [] if cfg.ask else load_questions(cfg.eval_data or cfg.corpus, "test")
    trains = not cfg.ask and not cfg.eval
    questions = load_questions(cfg.train_data or cfg.corpus, "train") if trains else []
    # The built-in agent knows the words of all questions, and its warm start asks all, also those
    # held out. It learns no answers by that: retriever.py scrambles the names.
    everything = questions + held_out
    start = Path(cfg.resume, "start")  # the model after its warm start, see below
    started = cfg.resume != "" and start.exists()
    tok, model = load_model(str(start) if started else cfg.model, cfg, passages, everything)
    context, eos = model.config.max_position_embeddings, model.generation_config.eos_token_id
    env = Environment(tok, retriever, cfg, eos if isinstance(eos, list) else [eos])
    if cfg.ask:
        question = {"question": cfg.ask, "golden_answers": [], "set": None, "where": "--ask"}
        e, = rollout(model, env, keep_fitting(env, [question], context), temperature=0.0)
        show(env, e)
        return print(text_in_tag("answer", tok.decode(e.ids[e.action_start:])) or "no answer")
    held_out = keep_fitting(env, held_out, context)
    questions = keep_fitting(env, questions, context) if trains else []
    check_lessons(passages, everything if cfg.warm_steps > 0 else [])
    check(WORLD == 1 or cfg.resume or cfg.output_dir, "several processes need one --output_dir")
    name = Path(cfg.model).name
    folder = Path(cfg.resume or cfg.output_dir or time.strftime(f"runs/{name}-%y%m%d-%H%M%S"))
    flags = vars(cfg) | {"output_dir": "", "resume": "", "eval": False, "ask": ""}
    check(cfg.resume or RANK > 0 or not folder.exists(), f"--output_dir {folder} exists")
    write(folder / "flags.json", [flags])
    if not started and (cfg.warm_steps > 0 or cfg.model == "tiny"):
        warm_start(model, env, passages, everything, cfg)
        save_model(model, tok, folder / "start.new")
        write(folder / "start.new/flags.json", [flags])
        if RANK == 0:
            (folder / "start.new").rename(folder / "start")
    if cfg.eval:
        scores = evaluate(model, env, held_out)
        print(*(f"{name} {value:.3f}" for name, value in scores.items()), sep="\n")
        return write(folder / "eval.json", [scores | {"flags": flags}])
    initial_weights = {name: x.to("cpu", copy=True) for name, x in model.state_dict().items()}
    noisy_env, runs = copy.copy(env), {}
    noisy_env.retriever = ErringRetriever(retriever, passages, cfg.retrieval_noise)
    for llds_lambda in cfg.llds_lambda:
        name = f"lambda_{llds_lambda:g}"
        part = folder / name if len(cfg.llds_lambda) > 1 else folder
        write(part / "flags.json", [flags | {"llds_lambda": [llds_lambda]}])
        print(f"\n{name}: {part}")
        learner = new_learner(model, initial_weights, llds_lambda, cfg)
        train(learner, noisy_env, env, questions, held_out, part, cfg)
        runs[name] = learner.history
    report(runs)
def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the curves' characters
    cfg = parse_config(argv)
    try:
        with redirect_stdout(sys.stdout if RANK == 0 else None):  # None: print() is silent
            run(cfg)
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        stop(f"{type(error).__name__} {error}: go on by --resume and the run's folder; where memory"
             " is full, with a lower --micro_batch_size or --rollout_batch")
    finally:
        if dist.is_initialized() and WORLD == 1:  # leave the process as it was
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
    if WORLD > 1:
        sys.stdout.flush()
        os._exit(0)  # at once: in an ordinary exit Gloo's threads abort one process in ten or so
