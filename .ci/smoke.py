"""A small call of every operator of an installed wheel, C++ backend, against torch."""

import torch
import torch.nn.functional as F

import kdkernels as kd

assert "site-packages" in kd.__file__, kd.__file__
torch.manual_seed(0)
T, N, C = 12, 3, 7
student = torch.randn(T, N, C, requires_grad=True)
teacher = torch.randn(T, N, C)
targets = torch.randint(1, C, (N, 4))
lengths = torch.tensor([12, 11, 9]), torch.tensor([4, 3, 0])

ctc = kd.ctc_loss(student, targets, *lengths, backend="cpp")
ctc.backward()
got, student.grad = student.grad, None
expected = F.ctc_loss(student.log_softmax(-1), targets, *lengths)
expected.backward()
torch.testing.assert_close(ctc, expected)
torch.testing.assert_close(got, student.grad, rtol=0, atol=2e-5)

kl = kd.kd_loss(student, teacher, backend="cpp")
rows = student.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1)
torch.testing.assert_close(kl, F.kl_div(*rows, reduction="batchmean", log_target=True))

kd.ctc_kd_loss(student, teacher, targets, *lengths, backend="cpp").loss.backward()
occupancies = kd.ctc_posteriors(student.detach(), targets, *lengths, backend="cpp")
torch.testing.assert_close(occupancies[:9].sum(-1), torch.ones(9, N))
kd.ctc_align(student.detach(), targets, *lengths, backend="cpp")
print(f"kdkernels {kd.__version__}: fine")
