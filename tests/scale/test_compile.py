"""torch.compile of the wrapped distiller: what capture watches is seen, and the numbers are those of the plain run."""

import torch

from fakit import LayerMap
from tests.training.runs import data, logged, make, parts, weights

BACKEND = "aot_eager"  # traces as inductor does, without waiting for the C++ compiler


def test_a_compiled_run_is_the_plain_run(tmp_path):
    def run(folder, **compiled):
        trainer = make(
            folder,
            made=parts(layers=1, layer_map=LayerMap([(1, 2)]), num_hidden_layers=2),
            evaluated=data(rows=4),
            max_steps=2,
            optim="sgd",
            eval_strategy="steps",  # training again after an evaluation: another graph, and another after that
            eval_steps=1,
            **compiled,
        )
        trainer.train()
        return trainer

    torch._dynamo.reset()
    plain, compiled = (
        run(tmp_path / "plain"),
        run(tmp_path / "compiled", torch_compile=True, torch_compile_backend=BACKEND),
    )
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for term in ("loss", "features", "attention", "outputs", "task", "attention/S1_T2", "eval_loss"):
        assert len(logged(plain, term)) == 2
        torch.testing.assert_close(logged(compiled, term), logged(plain, term), rtol=1e-5, atol=1e-8)
    for name, value in weights(plain).items():
        torch.testing.assert_close(
            weights(compiled)[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    compiled.save_model(str(tmp_path / "exported"))
    again = type(compiled.student).from_pretrained(tmp_path / "exported")
    assert all(torch.equal(value, compiled.student.state_dict()[name]) for name, value in again.state_dict().items())
