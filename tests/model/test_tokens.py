"""`Tokens`: rows are chosen reproducibly."""

import torch

from mmbert.model.tokens import Tokens


def test_gradient_of_repeated_rows_is_the_same_with_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 40, 128, generator=generator)  # large enough that torch uses both threads
    index = torch.randint(0, 64, (448,), generator=generator)
    gradient = torch.randn(448, 40, 128, generator=generator)
    mask = torch.ones(64, 40, dtype=torch.bool)

    def gradients() -> torch.Tensor:
        leaf, layer = states.clone().requires_grad_(), states.clone().requires_grad_()
        chosen = Tokens(leaf, mask, (layer,)).rows(index)
        torch.autograd.backward([chosen.hidden_states, chosen.intermediate[0]], [gradient, gradient])
        assert leaf.grad is not None and layer.grad is not None
        return torch.stack([leaf.grad, layer.grad])

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        assert all(torch.equal(gradients(), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    expected = torch.zeros(64, 40, 128).index_add_(0, index, gradient)
    torch.testing.assert_close(first[0], expected)
