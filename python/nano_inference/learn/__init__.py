"""The learning path: experiments that switch the engine's own options on and off and look at what
it then does. `nano-inference learn` lists them; docs/learn explains them.

An experiment says what it expects, from first principles, before it runs (experiment.py); it gets
its engines from a Lab (lab.py), and the operations and bytes of a step from work.py. A stage is a
module with a list EXPERIMENTS; catalog.py names the stages."""
