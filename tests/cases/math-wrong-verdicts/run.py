from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.math import verify_math

for reference, response, right in (
    ("0.00000012", r"\boxed{0.00000034}", False),
    ("0.0000005", r"\boxed{0.0000001}", False),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", False),
    (r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}", False),
    ("5", "<answer>5</answer>", True),
    ("5", "<think>2+3</think><answer>5</answer>", True),
    ("5", r"First I had \boxed{3}, but it is \boxed{5}", True),
    (r"(-\infty, 3)", r"\boxed{x<3}", True),
    (r"\[5\]", r"\boxed{5}", True),
    ("½", r"\boxed{\frac12}", True),
    ("√2", r"\boxed{\sqrt{2}}", True),
    ("1 1/2", r"\boxed{\frac{3}{2}}", True),
    ("42", r"\fbox{42}", True),
    ("5", r"\boxed{7=5}", False),
):
    got = verify_math(Prompt("", "", (), reference, "math"), response).correct
    print("DIFF" if got != right else "    ", reference, "|", response, "| should be", right, "| is", got)
