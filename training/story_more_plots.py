"""The second half of the story writer's plots (`story_plots` says how to read them)."""

MORE_PLOTS = {}

MORE_PLOTS["brave"] = """
@open

@likes?

But {N} was afraid of [many things|the dark|loud noises|being alone].
{N} was [not a hero|no hero at all]. Even [a sneeze|a shadow] could make {him} jump.
Others called {N} [timid|a scaredy-cat], and that [hurt|stung].
"I am not brave," {N} [often said|used to say], "but I am good at being careful."
{N} liked to be safe, with a wall behind {him} and a friend in front.
When others climbed and jumped, {N} [watched|stood by].
---
@set

@detail?

@subplot?

@friend

There they came to {dare}. Nobody liked to go there, for {why}.
Near the path was {dare}, and {N} walked past it [quickly|on tiptoe], because {why}.
"Look, {dare}," said {F}. {N} shivered, because {why}.
"I would never go near {dare}," said {N}, "for {why}."
Everybody there knew {dare}, and everybody kept away from it, as {why}.
The only bad thing there was {dare}. They said that {why}.
---
Then they heard something. [Listen!|Could it be?] Yes, {need}.
"Do you hear that?" asked {F}. And truly, {need}.
All of a sudden there was a cry for help: {need}!
{N} stopped. "Something is wrong," {he} said, and so it was: {need}.
{F} pointed. "Look there!" It was plain to see that {need}.
And just on that day, {need}.

"I will run and get [help|{E}]," said {F}, and off {fhe} went. Now {N} was alone.
{F} had hurt a foot, so it had to be {N}.
There was nobody else who could help. {N} looked left, and {N} looked right.
"I cannot do it, I am too big," said {F}. "But you could, {N}."
"Somebody must go," said {N} in a very small voice.
{F} wanted to go, but {N} was the smaller one and the only one who could.

{His} heart [beat like a drum|went thump, thump, thump], and {his} knees were soft.
{N} thought of {dare}, and {his} mouth went dry.
"What if it goes wrong?" {he} thought. "And what if nobody helps?" That was worse.
{N} wanted to turn around, but {his} feet [stayed|did not move].
{He} was so afraid that {he} could hear {his} own teeth.
{N} closed {his} eyes for a moment and thought of {E}.
---
"One step," {he} told {himself}. "And now one more."
{N} [hummed|whispered] a song to keep {himself} company, and went on.
{He} counted {his} steps: one, two, three, all the way to forty.
{N} took a deep breath and set off, before {his} fear could catch up with {him}.
"I am afraid," said {N} aloud, "and I am going anyway."
Slowly, [with trembling {hands}|with wide eyes], {N} went ahead.

Halfway there, something [rustled|cracked], but {he} did not turn back.
Once {he} slipped, but {he} held on.
It was not as bad as {he} had thought.
Step by step the fear grew smaller, and {N} grew taller.
In the middle {he} [stopped to breathe|almost turned around], and then {he} went on.
A cold draft made {him} shiver, but it was only air.

Then {he} was there! "I am here to help," {N} said gently, and soon all was well.
{N} reached out with both {hands}, and in a minute the poor thing was safe.
"Hush, little one. I have got you," said {N}, and carried it out.
{N} did what had to be done, and the little creature was free.
There it was, so small and so frightened that {N} forgot to be afraid. {He} brought it to safety.
It took some time and some patience, but {N} managed the rescue.
---
"You did it!" cried {F}, who had come [running|back]. "You went to {dare}, all alone!"
When {F} heard the story, {fhe} [stared|whistled]. "And you say that you are not brave?"
"You are the bravest {k} I know," said {F}, and {N} [blushed|looked at {his} toes].
{F} [lifted|held] {N} up high and cheered until {fhis} voice was gone.
"Were you not afraid?" asked {F}. "Very much," said {N}, "but I went."
{E} [heard of it|had seen it all] and gave {N} a medal made of a [bottle cap|walnut].

Being brave, {N} found, does not mean having no fear. It means going on.
After that, {N} still jumped at shadows, but then {he} laughed.
{N} never called {himself} a coward again.
Somebody who is afraid and still helps is truly brave.
"Courage is small at first," said {E}. "It grows when you use it."
And {dare}? {N} was not afraid of it any more.

@end
"""

MORE_PLOTS["visitor"] = """
@open

@likes?

It was a [sleepy|quiet] week, and nothing [much|new] ever seemed to happen.
{N} was a bit lonely, for there was nobody of {his} age nearby.
"I wish [somebody new would come|something would happen]," said {N} to {E}.
{N} knew every face around, and every face knew {N}.
The house next to {N} had stood empty for a [year|long time].
{E} was busy, so {N} had to play alone.
---
@set

@detail?

Then {N} saw somebody [new|whom {he} did not know]. It was a {ft} {fk} named {F}[| with a big suitcase| in a dusty coat].
There, on a suitcase, sat a {fk}. "I am {F} the {fk}, and I come from far away," said the stranger.
A [wagon|boat|bus] stopped, and out stepped a {ft} {fk} named {F}.
All by {himself}, {N} was building a tower of stones when a {fk} named {F} came up the path.
A {ft} {fk} named {F} stood there with a map that was upside down, and {N} was curious.
"Excuse me," said somebody behind {N}. It was a {fk}, a stranger. "I am {F} the {fk}. Am I in the right village?"

{F} [spoke|talked] in a funny way and wore a coat with nine pockets.
{F} was tired, because {fhe} had traveled for [three days|a week].
Some neighbors whispered and stared at {F}, and that made {fhim} sad.
{F} did not know anybody there, and {fhe} looked at the ground.
"Where I come from, everything is different," said {F} with a sigh.
{F} said little at first, for {fhe} was very shy.
---
{N} did not know what to say. Then {he} remembered how it felt to be alone.
"Welcome!" said {N}. "I am {N}. Are you hungry?"
"You must be tired," said {N}. "Come and sit with me."
{N} walked right up to {F} and held out a plum.
{N} smiled, and a smile is the same in every land.
"Would you like to see [everything|my favorite spot]?" asked {N}.

So {N} showed {F} {see}, and after that {see2}.
{N} took {F} around and told {fhim} the name of everything.
Together they ate hot {dish}, and {F} asked for more [twice|three times].
{N} brought {food} from home, and {F} had something from a faraway land that tasted of flowers.
{N} and {F} played a game that {F} knew from home.
{F} listened to {sound} and said to {N}, "I have never heard that before."

@subplot?

But then {F} sat down and cried a little. "I miss my home," {fhe} told {N}.
"Do you think that anybody here will like me?" {F} asked. "I already do," said {N}.
{F} laughed for the first time in days, and {N} laughed too.
{F} showed {N} how to fold a bird out of paper.
{N} taught {F} three new words, and {F} taught {N} three others.
In the evening light {F} told {N} about mountains of ice and a sea of sand.
---
The next day {N} took {F} along to meet all the others.
{N} asked everyone to come to a welcome party, and they all brought {food}.
Now the others came nearer, too. One asked a question, another brought a chair for {F}.
"This is {F}, my friend," said {N} to everyone, and soon there was a circle around them.
The neighbors saw how much fun {N} and {F} had, and they wanted to join in.
{E} baked a pie with "welcome" written on it, and {F} read it aloud, letter by letter.

{F} decided to stay, and {fhe} moved in next door to {N}.
"I came as a stranger," said {F}, "and now I have a friend."
When {F} had to travel on, {fhe} promised to write to {N}, and {fhe} did, every week.
{F} hung {fhis} coat on a hook and said, "Here I am at home."
Nobody stared at {F} any more. They waved.
{F} unpacked {fhis} suitcase, and the first thing that came out was a gift for {N}.
---
{N} learned that a stranger is often a friend whom one has not met yet.
It had taken only one kind word from {N} to begin it all.
"How lucky that I said hello," thought {N}.
{N} was never lonely again.
And whenever somebody new comes, {N} and {F} are the first to say hello.
"A door is nicer when it is open," said {E}, and {N} agreed.

@end
"""

MORE_PLOTS["race"] = """
@open

@likes?

{N} was fast. In {his} whole life {he} had [never lost|hardly ever lost] a race.
{N} was not very fast, but {he} loved to run.
Each year there was a great race, and {N} had [waited for it|practiced for months].
"This year I will win," said {N} to {E}.
{N} trained each morning, up the path and down again.
Above the stove hung a list of all the winners, and {N} wanted to be on it.
---
On the day of the race it was {w}, and everyone came {tp}.
The big race was held {p}, on a {w} morning.
One {w} day, a crowd gathered {p}, for it was the day of the race.
Flags waved {p}, and the day was {w}. The race was about to begin.
So, on a {w} morning, {N} walked {tp}, where the race would start.
"Runners, come {tp}!" called a loud voice on that {w} morning.

@detail?

@subplot?

Next to {N} stood {F}, a {ft} {fk}[| with long legs| in a striped vest].
{F} the {fk} was there too, and everybody said that nobody could beat {fhim}.
"Good luck," said the runner beside {N}. It was {F}, a {ft} {fk}.
{N} saw a {ft} {fk} named {F} who [tied|checked] {fhis} shoes [twice|three times].
The favorite was {F}, a {ft} {fk}, who had won the year before.
A {ft} {fk} named {F} [bounced|hopped] up and down at the starting line.

"Ready, steady, go!" And off they went.
A horn blew, and [dust flew|everyone ran].
"Three, two, one, go!" The crowd roared.
Somebody dropped a white cloth, and the race was on.
Bang! The race had started, and {N} shot ahead.
"On your marks!" Everyone held still. "Go!" Everyone flew.
---
At first {N} was in front, with {F} [just behind|close behind].
{F} took the lead, but {N} [stayed close|did not give up].
They passed {see}, and then {see2}, side by side.
{N} passed one runner, then another, until only {F} was ahead.
Soon the others were far behind, and it was {N} against {F}.
The track went past {see}, and {N} had no time to look.

Then, near the end, {F} tripped and fell. "Ow, my leg!" {fhe} cried.
All at once {F} slipped on a wet leaf and rolled into a ditch.
Just before the last bend, {F} stepped into a hole and could not get up.
There was a cry. {N} looked back and saw {F} on the ground, holding {fhis} knee.
But {F} stumbled over a root, and there {fhe} lay.
A few steps from the finish, {F} got caught in a bush and could not get free.

The finish was so near. {N} could see the line. [But {he} stopped|Still, {he} turned around].
"If I run on, I will win," thought {N}. But {he} did not run on.
{N} could have won right then. {He} thought about it for one second.
{N} slowed down. Winning suddenly did not feel so important.
{N} looked at the finish, and {N} looked at {F}, and made up {his} mind.
"Run!" the people shouted, but {N} had already turned back.
---
"Take my arm," said {N}. "We will go together."
{N} helped {F} up and [brushed off the dirt|tied a cloth around the sore leg].
"Lean on me," said {N}, and {F} did.
"Why did you stop?" asked {F}. "Because you fell," said {N}.
{N} pulled, and {F} stood up on wobbly legs.
{N} put one arm around {F}. "Left, right, left," {he} counted.

Side by side they [hobbled|limped] over the line, and a snail was not much slower.
They came in last, together, and the crowd cheered louder than ever.
They crossed the line at the very same moment, arm in arm.
Somebody else won that day, but all eyes were on the two.
So they finished last of all, and both of them were laughing.
Other runners passed them by. It did not matter.

Then the judge gave [both of them|the two] a medal for [fair play|the kindest run].
"Anyone can run fast," said the judge. "Few can stop at the right time."
"You lost the race and won something better," said {E} to {N}.
{F} took a flower from the winner's wreath and gave it to {N}.
Even the winner came over and shook hands with {N}.
"Next year we will race again," said {F}, "and I hope that you win, {N}."
---
{N} was not sad about it, because {he} knew that {he} had done right.
{N} learned that there is more than one way to win.
After that, {N} and {F} ran together every morning.
"A medal gets dusty, but a friend does not," {N} said.
The list above the stove stayed as it was, and {N} did not mind.
When {his} {home} was quiet at night, {N} could still hear the cheering.

@end
"""

MORE_PLOTS["plant"] = """
@open

@likes?

{E} had given {N} a {seed}. "[Be good to it|Take care of it]," said {E}.
One day {N} found a {seed} in {his} pocket. "How did you get in there?" {he} asked.
{N} bought a {seed} for a single coin.
A bird dropped a {seed} right in front of {N}.
In an old box {N} discovered a {seed}, as small as a crumb.
As a thank you for some help, {N} got a {seed} from a neighbor.
---
@set

@detail?

@subplot?

{N} dug a little hole, put the {seed} in, and covered it [with earth|like a child in bed].
In a sunny corner, {N} made a hole with one finger and dropped the {seed} into it.
{He} pushed the {seed} into the soft earth and patted it [gently|twice].
{N} loosened the soil, took out the stones, and planted the {seed}.
"Sleep well, little one," said {N}, and buried the {seed}.
{N} put a stick next to the place where the {seed} lay, so that nobody would step on it.

Then {N} sat down to wait. {He} waited [for an hour|until supper]. Nothing happened.
"Grow!" said {N}. But the earth stayed brown and bare.
{N} gave it water and [sang it a song|told it a joke].
The next morning {N} ran to look. There was nothing to see.
{N} looked every day, and every day there was only dirt.
For a whole week nothing moved, and {N} grew [impatient|sad].
---
@meet

"My {seed} does not grow," said {N}. "Maybe it is broken."
"I planted a {seed}, but nothing comes," {N} explained to {F}.
{N} pointed at the bare spot. "I think it is dead," {he} told {F}.
"Should I dig it up and look?" {N} asked {F}.
"How long does a {seed} need?" {N} wanted to know from {F}.
"I have waited and waited," {N} said to {F}, "and all for nothing."

"It is busy under the ground," said {F}. "First come the roots. Give it water and time."
"Seeds cannot read the clock," said {F}. "Be patient."
"Never dig it up," said {F}. "It needs sun, water, and peace."
{F} smiled. "Good things are slow. Water it each morning and wait."
"When I was small, I pulled at a plant to make it grow," said {F}. "Do not do that!"
"Listen," said {F}, with one ear to the ground. "I am sure that it is stretching."
---
So {N} came back every morning with water, and {F} often came along.
{N} watered it, kept the weeds away, and did not complain.
When it was hot, {N} gave it shade, and when it was dry, {N} carried water.
{F} and {N} took turns, one day each.
{N} marked each day on a stick, ten marks, then twenty.
It rained, and the sun shone, and {N} waited.

Then one morning there was a tiny green tip!
One day {N} shouted, "Come quickly!" Two little leaves were looking out of the earth.
And all at once there it was, a green dot, no bigger than a tear.
On the twelfth day the soil cracked, and a pale green neck came out.
"It is alive!" cried {N} and [danced|hopped] around the sprout.
A sprout! {N} knelt down and hardly dared to breathe.

It grew and grew, until it was a {plant} as tall as {N}.
The weeks went by, and the sprout turned into a strong {plant}.
Leaf by leaf it became a real {plant}.
By the end of summer, it was the finest {plant} far and wide.
A snail wanted to nibble at the {plant}, but {N} carried it to the [grass|weeds].
Once a storm bent the {plant}, so {N} tied it to a stick, and it stood up again.

And what came of it? There was {fruit}!
At last came the reward: {fruit}.
"Look, {F}!" said {N}. On the {plant} they could see {fruit}.
From that one {seed} came {fruit}.
Then, in the warm light of autumn, there was {fruit}.
Everybody came to see the {plant} and {fruit}.
---
{N} kept one new {seed} for the next year[| and gave another to {F}].
"You were right," said {N} to {F}. "Waiting was worth it."
{N} had learned to wait, and that is not easy.
{N} and {F} had a little feast beside the {plant}.
{E} said, "You have a green thumb," and {N} looked at {his} {hands} in surprise.
Now {N} gives every friend a {seed} and a bit of good advice.

@end
"""

MORE_PLOTS["mistake"] = """
@open

@friend

{F} had a {o}, and {fhe} [loved it dearly|kept it very clean].
{F} had just got a {o}, and {N} thought it was wonderful.
What {F} treasured most was a {o}.
{N} had always admired the {o} that belonged to {F}.
{F} owned a {o}, made by {fhis} own {elder}.
Everybody knew how much {F} loved {fhis} {o}.
---
@set

@detail?

@subplot?

"Would you watch my {on} for a minute?" asked {F}, and {fhe} went to get some {food}.
{F} put the {on} down and went to fetch water. "Please do not touch it," {fhe} said to {N}.
{F} fell asleep in the shade, and the {on} lay right beside {fhim}.
While {F} was away, {N} looked at the {on}. Just one little touch could not hurt.
{F} left the {on} on a flat stone and ran to greet somebody.
"I will be right back," said {F}, and {N} was alone with the {on}.

{N} picked it up, only to look. It slipped. Crack!
{N} wanted to try it out, pulled too hard, and snap, it broke.
{N} spun around with it, laughing, and bumped into a post. Crunch.
{N} lifted it up high, sneezed, and dropped it.
{N} turned it over to see how it worked, and a piece came off.
It was an accident: {N} stepped back, and there was a terrible crack under {his} foot.

{N} went cold all over. The {on} was broken.
"Oh no! What have I done?" [whispered|gasped] {N}.
The pieces lay there, and {N} could not look away.
{He} tried to push the parts together, but they did not hold.
{N} looked around. Nobody had seen it.
{His} ears burned, and {his} stomach felt like a knot.
---
"I could say that the wind did it," thought {N}.
{N} hid the pieces under some leaves. But {he} could not hide {his} face.
When {F} came back, {N} said, "A big bird did it!" It was not true.
{N} wanted to run away and never come back.
"Maybe {F} will not notice," {N} thought, although {he} knew better.
A lie lay ready on {his} tongue, and {N} swallowed.

{F} saw it and began to cry. That made {N} feel even worse.
{F} was very quiet. To {N}, a loud word from {F} would have been easier to bear.
"Who would do that?" asked {F} in a small voice, and {N} felt a sting in {his} chest.
That lie, or even the thought of it, weighed more than a sack of stones.
"A thing can be mended," {E} had once told {N}, "but trust is harder to fix."
{N} could not eat one bite of the {food}, because {he} felt so bad.

"{F}," {N} said at last, "it was me. I broke your {on}, and I am sorry."
Then {N} took all {his} courage together. "I did it, {F}. I am so sorry."
"I must tell you the truth," said {N} to {F}. "I touched the {on}, and I broke it."
{N} looked {F} in the eye. "It was my fault. Please forgive me."
"I am sorry," said {N}, and then {he} told {F} everything, from start to end.
It took three tries until {N} could say it. "I broke it, {F}. I am sorry."
---
For a while {F} said nothing. Then {fhe} wiped {fhis} face. "Thank you for telling me."
"I am angry," said {F}, "but I am glad that you told the truth."
{F} took a deep breath. "It was an accident," {fhe} said to {N}.
"I once broke my {elder}'s best jug," said {F}. "I know how you feel."
{F} was still sad, but {fhe} took the hand that {N} held out.
"You are more important than a thing," said {F} after a long time.

"I will help to mend it," said {N}, and they worked [all afternoon|until it held].
{N} fetched glue, and together they put the pieces in place.
{N} gave {F} all {his} savings for a new one, but {F} took only half.
With some string and glue, {N} and {F} fixed the {on}, and it was almost as good as before.
{N} took the {on} home, worked on it all evening, and brought it back in one piece.
{E} showed them how to repair it, and {N} did most of the work.

Now the weight was gone, and {N} could breathe again.
{N} felt as light as a leaf after that.
They shared the {food} after all, and every bite tasted good.
The {on} had a scar now, but {F} said it looked like a tiny river.
Then {F} began to giggle, and {N} giggled too.
"Next time, ask me," said {F}. "I will," said {N}.
---
{N} learned that the truth is hard for a moment and a lie is hard for a long time.
From then on, {N} asked before {he} touched things.
"Saying sorry is like opening a window," thought {N}.
{N} and {F} trusted each other even more than before.
A mistake is not the end, if one is honest about it.
{E} was proud, because it takes courage to say sorry.

@end
"""

MORE_PLOTS["make"] = """
@open

@likes?

@friend
---
@set

@detail?

"Let us make a {work}!" said {N}. "[The best one ever|A really good one]!"
{N} had an idea. "We could make a {work}," {he} said to {F}.
{F} was bored. "What about a {work}?" asked {N}.
"Have you ever made a {work}?" {N} asked. "Never," said {F}. "Let us try!"
{F} had seen a picture of a {work}, and {N} wanted to make one at once.
There was nothing to do, and so {N} and {F} decided to make a {work}.

@subplot?
---
First they {step1}. Then they {step2}.
{N} drew a plan in the dust. They {step1}, and after that they {step2}.
They {step1}, which took a long time, and {step2}.
Together they {step1}. "Now comes the fun part," said {F}, and they {step2}.
With a lot of laughter they {step1}, and before noon they {step2}.
It was hard work. They {step1}, rested a little, and {step2}.

But there was a problem: {trouble}.
All went well, until they saw that {trouble}.
"Oh dear," said {F}, because {trouble}.
Then came the trouble. {N} frowned, for {trouble}.
When they looked at it, {trouble}.
It was not right yet, for {trouble}.

"It is your fault," said {N}. "No, yours!" said {F}. They turned their backs on each other.
{N} wanted to do it one way and {F} another, and for a while nobody spoke.
{F} sat down. "It will never work," {fhe} said.
{N} was so cross that {he} nearly kicked it.
They stood there and scratched their heads.
"We could give up," said {F}. "Or we could think," said {N}.
---
{N} looked at it from the other side. "We could {answer}," {he} said.
Then {F} had an idea. "Why not {answer}?" {fhe} asked.
"I am sorry that I was cross," said {N}. "What if we {answer}?"
"My {elder} would {answer}," said {F}. It was worth a try.
Both said it at the same time: "Let us {answer}!"
{E} came by, looked, and said, "You might {answer}."

{N} did one half and {F} did the other, and so it was quickly done.
They tried it out, and at the second try it was right.
They worked hand in hand until the {work} was ready.
{F} was good at the small parts, and {N} was good at the big ones.
"Now you, now me," they said, and so it went.
When one of them got tired, the other one took over.

At last the {work} was done, and it {use}.
And truly, the {work} {use}!
What a {work} it was! It {use}.
{N} held {his} breath. But the {work} {use}.
"Let us see," said {F}. And the {work} {use}!
The {work} was a bit crooked, but it {use}.

{N} and {F} [shook hands|looked at each other and laughed].
"We did that," said {N}. "We two," said {F}.
{E} came to look at it and clapped for a long time.
Neighbors came and wanted to know how they had done it.
{F} wrote both names on a sign: {N} and {F}.
They had {food} to celebrate the great work.
---
Alone, {N} would have given up. Alone, {F} would never have started.
{N} learned that two heads have more than twice as many ideas.
"Your idea and my idea make our idea," said {F} to {N}.
Good teams may quarrel, but they do not stop.
"What shall we make tomorrow?" asked {N}, and {F} had a list.
{N} was proud, and {he} knew that half of it was thanks to {F}.

@end
"""

MORE_PLOTS["noise"] = """
@open

@likes?

@friend
---
@set

@detail?

{N} and {F} played there all day long, until it got dark.
They had so much fun that {F} asked, "May I sleep at your place tonight?" {N} said yes.
It was a long day, and in the evening {F} came to stay the night with {N}.
When the light faded, {N} took {F} home for the night.
By the time the moon rose, they were tired, and {F} stayed overnight with {N}.
In the evening {E} made two beds, one for {N} and one for {F}.

They ate hot {dish}, brushed their teeth, and put out the light.
{E} told them a story, kissed them good night, and shut the door.
{N} blew out the candle. It was very dark.
"Good night," said {N}. "Good night," said {F}.
Soon the whole {home} was quiet.
Under thick covers they whispered for a while, and then it was still.
---
In the middle of the night {N} woke up. There was {noise}!
Suddenly they heard {noise}.
"Did you hear that?" asked {F}. {N} had heard it, too: {noise}.
What was that? There it was again, {noise}.
{N} was almost asleep when there came {noise}.
Then, out of the dark, came {noise}.

"It must be {fear}," [whispered|breathed] {F}, and {fhe} pulled the covers up.
{N} thought of {fear}. {He} did not dare to move.
"What if it is {fear}?" asked {N}.
"{N}, I think it is {fear}," said {F} with big eyes.
In the dark it was easy to believe in {fear}.
{F} hid under the bed. "I am sure it is {fear}," {fhe} said to {N}.

They held each other tight. There it was once more.
{N} could hear {his} own heart.
Neither of them said a word. The noise did not stop.
{F} put both {fhands} over {fhis} ears, but it did not help.
{N} counted to ten. It was still there.
A cloud slid over the moon, and it grew even darker.
---
"I want to know what it is," said {N} at last.
"If we do not look, we will be afraid all night," said {N}.
{N} lit a candle with shaking {hands}. "Come with me, {F}."
"Noises have reasons," {E} always said. {N} thought about that.
{F} did not want to go, but {fhe} did not want to stay behind {N} either.
"Together?" asked {N}. "Together," said {F}.

On tiptoe they went, one step, two steps, three.
{N} went first, and {F} held on to {his} sleeve.
The floor was cold, and the shadows were long.
Closer and closer they crept. The noise grew louder.
{N} held the light up high, while {F} looked out from behind {him}.
They opened the door, only a crack.

And what was it? It was only {cause}!
{N} lifted the light and began to laugh. It was {cause}.
"Look!" said {F}. There was no ghost and no monster. It was {cause}.
There it was: {cause}. That was all.
There was nothing like {fear}. It was {cause}.
"So that is {fear}," said {N} and giggled. For it was {cause}.

{F} laughed so hard that {fhe} had to sit down.
"And I was so afraid," said {F}. "Me too," said {N}.
{E} came to see what was so funny, and then all three laughed.
{N} took care of it, and then it was quiet.
"Poor us," said {N}, and both of them giggled.
They felt silly and brave at the same time.
---
"In the light, big fears are small," said {N}.
{N} had learned to look first and be afraid later.
Not every noise is a monster. Most of them are not.
"Next time I will not hide," said {F}.
{N} told {F} that every noise has a reason. One only has to find it.
Now they knew, and knowing makes the dark a little lighter.

Soon {N} and {F} were [fast asleep|asleep], and they slept until [the sun was high|breakfast].
Back in bed, {N} [yawned|smiled], and then {he} dreamed of {see}.
Before {F} could say another word, {N} was asleep.
In the morning they told everyone about it and laughed all over again.
"Good night, monster," said {F}, and {N} fell asleep with a smile.
The moon looked in and saw two friends, sleeping [side by side|peacefully].
And if {N} hears something at night now, {he} only smiles and sleeps on.
"What a night!" said {F} at breakfast, and {N} laughed with a full mouth. Then they both had more {food}, happy and safe.
"""

MORE_PLOTS["cross"] = """
@open

@likes?

{E} always said, "Nobody is too small to be helped," and {N} remembered it.
{N} was on {his} way to visit a friend.
That day {N} had [no plans|nothing to do], which is the best kind of day.
{N} had promised {E} to be back by supper.
{E} had sent {N} out to fetch some {food}.
{N} was in a hurry, because there was a party with {food} later on.
---
@set

@detail?

@subplot?

There was a {barrier}, and {N} was just about to jump over it.
{N} came to a {barrier}. For {him} it was only one step.
{N} reached a {barrier} and heard a voice, as thin as a thread.
Beside a {barrier}, {N} stopped to catch {his} breath.
In the middle of the way was a {barrier}.
A {barrier} lay across the path.

At its edge sat a {small}. It {reason}, but it could not get across.
"Help," said a tiny voice. It was a {small} that {reason}.
{N} almost stepped on a {small}. The poor thing {reason}.
Down in the grass was a {small}. It {reason}, and it did not know what to do.
A {small} walked up and down there. It {reason}, it told {N}.
Then {N} saw a {small}, all alone. It {reason}.

"I must get to the other side," said the {small}, "but it is too much for me."
For the {small} it was a great danger, because {peril}.
The {small} had tried three times already, but {peril}.
"I have waited since sunrise," said the {small}, and it sniffed.
You see, {peril}. How could a {small} ever get across?
"Please, could you help me over?" asked the {small}.
---
{N} wanted to lift the {small}, but it was afraid of {his} big {hands}.
"Climb on my back," said {N}, but the {small} was too frightened.
{N} thought and thought. There had to be a way.
"I would like to help," said {N}, "but how?"
Others walked by and did not even look. {N} did not.
{N} could have gone on, but {he} could not leave the {small} there.

@meet

"You need a {tool}," said {F} when {N} had told {fhim} everything.
{F} looked at the {small} and then at the {barrier}. "A {tool} would do," {fhe} said.
"I saw a {tool} over there," said {F}. "Would that help?"
"Let us use a {tool}," said {F} to {N}.
{N} and {F} put their heads together, and soon they had a plan. They needed a {tool}.
"When I was little, somebody helped me with a {tool}," said {F}.
---
So they fetched a {tool} and laid it across the {barrier}.
{N} held one end of the {tool} and {F} held the other.
It took some pulling and pushing, but then the {tool} lay safely in its place.
{F} found a {tool}, and {N} put it where it was needed.
They carried the {tool} together, for it had to be done with care.
Carefully, {N} set the {tool} in place and tested it twice.

"Do not look down," said {N} to the {small}. "Look at me."
The {small} trembled, but it took one step, and another one.
Very, very slowly the {small} began to move. {N} did not rush it.
"You can do it," whispered {F}, while {N} kept everything steady.
Once the {small} stopped in the middle. "I am right here," said {N}.
A breeze made it shake, and {N} held it with all {his} might.

And then the {small} was across!
One last step, and it was safe on the other side.
At last the {small} felt firm ground and gave a happy squeak.
"Hurrah!" cried {N} and {F}. The {small} had made it.
It had taken half the afternoon, but now it was done.
The {small} looked back in wonder. "I crossed it," it said.
---
"Thank you, kind {k}," said the {small}. "I will never forget it."
The {small} bowed to {N} and to {F}, and then it hurried away.
"You are big, and you have time for the small," said the {small}. "That is rare."
The {small} waved until they could not see it any more.
"If you ever need me, call," said the {small}. And {N} did not laugh.
The {small} had nothing to give but a song, and {N} thought that it was a fine one.

{N} was late for supper, but {E} was not angry after hearing why.
"It was only a little thing," said {N}. "Not for the {small}," said {F}.
{N} had lost some time and won two friends.
{N} learned that small help can be big to somebody.
A few days later the {small} brought its whole family to say hello to {N}.
They left the {tool} there, in case somebody else had to get across.

@end
"""

MORE_PLOTS["borrow"] = """
@open

@friend

{F} had a {o} that was [quite new|very fine], and {N} often looked at it.
{F} had a {o}. {N} wished {he} had one, too.
There was one thing that {N} needed, and only {F} had it: a {o}.
{N} had heard that {F} owned a {o}.
In a box under {fhis} bed, {F} kept a {o}.
{F} was careful with {fhis} things, most of all with {fhis} {o}.
---
"May I borrow your {o}?" asked {N}. "[I will bring it back by sunset|You will have it back tonight]."
"Please lend me your {o}, just for today," said {N} to {F}.
"Could I have your {o} until this evening?" {N} asked {F}. "I promise to return it."
{N} asked {F} for the {o}. "Only for one day," {he} promised.
"If I lend you my {o}," said {F}, "will you bring it back tonight?" "I promise," said {N}.
{N} needed a {o} for the day, and so {he} asked {F} nicely.

"[Of course|Gladly]," said {F}. "But I need it tomorrow morning."
{F} thought about it. "All right. A promise is a promise," {fhe} said to {N}.
"Be careful with it," said {F}, and gave it to {N}.
{F} wiped the {on} with {fhis} sleeve and gave it to {N}.
"Here," said {F}. "I trust you."
{F} handed over the {on}, and {N} said thank you twice.
---
@set

@detail?

{N} used the {on} all day, and it was a joy.
Everybody admired the {on}, and {N} told them that it was borrowed.
{He} played with the {on} until noon, and after noon {he} played on.
"How lovely it is," thought {N}. "I wish it were mine."
{N} had more fun with the {on} than with anything before.
Nobody else was allowed to touch the {on}. {N} watched over it.

@subplot?

Somebody even wanted to buy the {on} for ten coins. "It is not mine to sell," said {N}.
{N} kept it away from mud and water, for {he} had given {his} word.
Once it slipped, but {N} caught it just in time.
{He} put it in {his} bag and checked every hour that it was still there.
"You could keep it," said a magpie. "{F} would not notice." {N} shook {his} head.
At lunch {N} laid it on a clean cloth, far from the {dish}.
---
Then the sun sank low. {N} was tired, and the way to {F} was long.
It was getting dark, and a cold rain began to fall. But {N} had made a promise.
{N} was already in {his} slippers when {he} remembered the {on}.
"You could take it back tomorrow," said {E}. {N} looked at the dark window.
When evening came, {N} was so sleepy that {he} could hardly stand.
Supper was ready, and it smelled good. Then {N} saw the {on} on a chair.

"I promised," said {N}, and put on {his} coat.
{N} sighed, took a lamp, and went out again.
"A promise is a promise," {he} told {himself}.
{F} was waiting, and {N} knew it. So {he} set off.
{N} ran, so that {he} would get there before dark.
It would have been easy to stay, but {N} went.

The path was muddy and the wind was cold, but {N} held the {on} safe under {his} coat.
Twice {he} slipped in the mud, and twice {he} held the {on} up high.
An owl hooted, and {N} walked a little faster.
{N} sang all the way, so that the way got shorter.
{He} counted the lamps along the road, until there were none left.
Step by step {N} came nearer, and at last {he} saw a light.
---
{N} knocked. "Here is your {o}," {he} said to {F}. "As I promised."
{F} opened the door. "You came, in this dark!" {fhe} said, and took back the {on}.
"I knew that you would come," said {F}, and {N} gave back the {on} without a scratch.
There stood {F} at the gate, and {N} laid the {o} in {fhis} {fhands}.
"Not a scratch," said {F} with surprise when {N} gave back the {o}.
{N} returned the {o} and said thank you a third time.

"Now I know that I can lend you anything," said {F}.
"Come in and get warm," said {F}, and gave {N} hot {dish}.
{F} was so pleased that {fhe} said to {N}, "You may borrow it again on Sunday."
"You may have half of my {food}," said {F}, "for you keep your word."
{F} walked {N} home with a bright light, and they talked all the way.
"Tomorrow we will use it together," said {F}, and that was even better.

{N} learned that a kept promise makes a friend.
A borrowed thing must find its way home, and so it did.
{N} slept better than if {he} had kept the {on}.
Trust is like a bridge, and {N} had just laid a stone.
{N} was proud, because {he} had kept {his} word.
"It is good to have a friend like you," said {F}, and {N} thought the same.

@end
"""

MORE_PLOTS["honest"] = """
@open

@likes?

{N} had always wanted a {o}, but {he} had no money for one.
In the shop there was no {o}, and {N} had looked many times.
{N} had eleven coins in a jar. Ten more, and {he} could buy a {o}.
"Someday I would like to have a {o}," said {N} to {E}.
{E} said that a {o} was too dear, and {N} understood.
All that {N} wished for was a {o}.
---
@set

@detail?

And there, {spot}, lay a {o}!
{N} could not believe {his} eyes. Somebody had left a {o} {spot}.
Something shone {spot}. {N} went closer. It was a {o}!
{N} bent down to tie a shoe and saw a {o} {spot}.
{N} looked {spot}, just by chance, and found a {o}.
"What is that?" {N} said. A {o} was lying {spot}.

{He} picked it up. It was just what {he} had dreamed of.
Nobody was near. {N} held it and [smiled|trembled a little].
"Finders keepers," thought {N}, but it did not feel right.
{N} turned it this way and that. It was very well made.
{N} put it into {his} bag. Then {he} took it out again.
"It could be mine," {N} whispered.

But somebody must be missing it, and that somebody was sad.
Then {N} noticed a little mark on it. It belonged to someone.
"Whoever lost it will cry tonight," thought {N}.
{N} remembered the day when {he} had lost something, and how that had felt.
{N} thought of {E} and knew what was right.
If {he} kept it, {he} would have to hide it. What fun would that be?
---
So {N} set out to find the owner.
{N} asked a goose. "Not mine," said the goose. {He} asked a postman. "Not mine," said the postman.
"Is this yours?" {N} asked everyone {he} met.
{N} went from door to door and knocked at every one.
{N} made a sign: "Found! Tell me what it is, and you shall have it."
{He} waited right there for an hour, in case somebody came back.

@subplot?

At last {he} heard somebody crying. It was {F}, a {ft} {fk}.
Then a {ft} {fk} named {F} came along, looking at the ground.
There was a {fk} who looked under every stone. "I am {F} the {fk}," came the answer when {N} asked.
In the afternoon {N} met a {ft} {fk} named {F} with red eyes.
A {ft} {fk} named {F} stood there with empty {fhands} and a long face.
{N} heard a sob, and behind a wall sat {F}, a {ft} {fk}.

"What have you lost?" asked {N}. "A {o}," said {F}, "from my {elder}."
"I have lost my {o}," said {F}. "I had it only this morning."
{F} sniffed. "Have you seen a {o}? I have lost mine," {fhe} said.
"Tell me what you are looking for," said {N}. "It is a {o}," said {F}.
"My {o} is gone," {F} told {N}, "and it was a present."
"You are looking for something," said {N}. {F} nodded. "For my {o}."
---
{N} held out the {o}. "Here it is."
"Then this is yours," said {N}, and gave {F} the {o}.
Without a word {N} laid the {o} in front of {F}.
{N} reached into {his} bag and took out the {o}. "Is this the one?"
"I found it {spot}," said {N}. "Take it back."
For one last time {N} looked at the {o}, and then {he} gave it to {F}.

{F} laughed and cried at the same time. "You are so honest!" {fhe} said to {N}.
"You could have kept it," said {F}. "I could not," said {N}.
{F} pressed the {on} to {fhis} chest and hugged {N}.
{F} did not know what to say, so {fhe} shook {N} by the hand, up and down.
"I never thought that I would see it again," said {F}.
{F} jumped so high that a bird flew off.

"Let us share it," said {F}. "One day you, one day me."
As a thank you, {F} gave {N} a bag of {food}.
"Come to my house on Sunday," said {F}, "and we can play with it together."
{F} wanted to give {N} a reward, but {N} shook {his} head.
Some weeks later {N} got a parcel from {F}, and inside was a {o} just like it.
{F} ran home to tell everyone about the honest {k}.
---
{N} had nothing in {his} bag, but {his} heart was full.
{N} had learned that doing right feels better than having things.
"I gave away a thing and got a friend," said {N} to {E}.
{E} was very proud and hugged {N} for a long time.
Being honest is easy afterward. It is hard only before.
{N} was glad that {he} had not kept it.

@end
"""

MORE_PLOTS["sick"] = """
@open

@friend

@likes?
---
@set

@detail?

{N} and {F} had planned to meet there, but {F} did not come.
{N} waited for {F}, first ten minutes, and then an hour.
{F} had promised {N} to be there. Where could {fhe} be?
{N} looked around for {F}, but {fhe} was nowhere to be seen.
"Where is {F}?" wondered {N}. "{fHe} is never late."
They wanted to play pirates, but without {F} it was no fun for {N}.

@subplot?

So {N} went to the house of {F} and knocked. "Come in," said a weak voice.
{N} began to worry and ran to see {F}.
Then a neighbor told {N} that {F} was sick in bed.
{N} looked through the window and saw {F} in bed, with a red nose.
At the door of {F} hung a note: "I am sick." {N} went in on tiptoe.
{E} came and said to {N}, "{F} has a fever today."
---
"Achoo!" said {F}. "I have caught a cold."
{F} was hot and shivered at the same time. "My head hurts," {fhe} said to {N}.
{F} coughed and coughed. {fHe} could not even laugh at a joke.
"Do not come too close," said {F}. "I am full of sneezes."
{F} had eaten nothing, for {fhis} throat was too sore.
"I am so bored and so tired," said {F}, and a tear ran down to {fhis} chin.

{N} felt sorry for {F}. "I will take care of you," {he} said.
"Stay in bed," said {N}. "I know what to do."
{N} did not think twice. {He} rolled up {his} sleeves.
"What do you need?" asked {N}. "Just somebody to be here," said {F}.
"Today I am your nurse," said {N} to {F}.
{N} remembered what {E} always did for colds.
---
{N} squeezed two lemons and made hot {dish}, the way {E} did.
First {N} cooked some {dish}, and it smelled so good that {F} sat up.
{N} put a cool cloth on the hot forehead of {F}.
{N} boiled water with honey and mint, and {F} drank it in little sips.
{N} shook the covers, opened the window for a minute, and made {F} some tea.
From home {N} brought {food} and a warm pair of socks for {F}.

Because {F} was bored, {N} read {fhim} a book with all the voices.
{N} told {F} what {he} had seen {p}: {see} and {see2}.
{N} drew {see} on a big sheet and hung it over the bed of {F}.
With two socks on {his} {hands}, {N} gave a show, and {F} laughed until {fhe} coughed.
They played a quiet game with dots and lines, and {N} let {F} win.
{N} sang softly until {F} fell asleep.

In the evening {N} did not want to leave, so {E} let {him} stay longer.
{N} tidied the room, quiet as a shadow.
While {F} slept, {N} washed the dishes.
{N} sat by the bed and watched over {F}.
{F} slept deeply, and {fhis} forehead grew cooler.
{N} left a glass of water beside the bed, in case {F} needed something.
---
The next day {F} was a bit better, and the day after that {fhe} could get up.
After two days the fever was gone, and {F} wanted to hop about.
On the third morning {F} opened the door {fhimself}, with pink cheeks.
"I think I am well!" said {F} and threw off the covers.
Day by day the sneezes of {F} got smaller, until there were none.
{F} ate three plates of {dish}, so {N} knew that {fhe} was healthy again.

"You are the best nurse in the world," said {F}.
"It was you who made me well," said {F} to {N}, "with all your care."
{F} took {N} by the hand. "You stayed when I was no fun at all," {fhe} said.
"If you are ever sick," said {F}, "I will make the {dish}."
Now they could meet {p} at last, and they played twice as long.
And then {N} sneezed. "Oh no," said {F} and laughed. "Now it is my turn to be the nurse!"
---
{N} learned that just being there can be the best medicine.
A friend is somebody who comes when the fun is gone, and {N} was one.
{E} said, "You have a good heart," and {N} smiled.
{F} never forgot what {N} had done for {fhim}.
"Kindness is stronger than a cough," said {N}.
{N} was tired but happy, because {F} was well.

@end
"""

MORE_PLOTS["clues"] = """
@open

@friend

@likes?
---
One {w} morning {N} found a letter under the door. "Come {tp}," it said, "and use your eyes."
It was a {w} day. {N} and {F} found a bottle with a note in it: "Go {tp} and look for an arrow."
On a {w} morning, {F} came running to {N} with an old map that led {tp}.
One {w} day, {E} gave {N} and {F} a riddle. "The first clue is waiting for you {p}," said {E}.
A paper bird flew in through the window, on a {w} morning. {N} read it to {F}: "Come {tp}."
In an old book {N} found a map with a big cross {p}. It was a {w} day, so {F} wanted to go at once.

"A treasure!" cried {F}. "What are we waiting for?"
"Perhaps it is gold," said {F}. "Perhaps it is a trick," said {N}.
{N} took some {food} along, because treasure hunts make one hungry.
"We will need a good nose and a good head," said {N} to {F}.
{F} put on {fhis} best boots, and {N} took a magnifying glass.
They were so excited that {N} forgot to close the door.
---
@detail?

They searched for a while. Then {N} saw an arrow of pebbles. It pointed straight on.
The first clue was easy. {F} found it in a minute, scratched into a post.
"Here!" called {F}. Somebody had tied a bit of red wool to a twig.
On the ground were footprints, and {N} followed them like a detective.
At first {N} and {F} found nothing. Then they noticed three white stones in a row.
{N} found a slip of paper under a stone. "Twenty steps toward the sun," it said.

Next came a riddle: "I have hands but cannot clap. What am I?" "A clock!" said {N}.
The second clue was a riddle: "What gets wetter the more it dries?" {F} thought hard. "A towel!"
"What has a neck but no head?" {N} read. "A bottle," said {F}, and right they were.
A second note said: "I follow you all day and sleep at night." "My shadow!" cried {N}.
There was another note: "What goes up when the rain comes down?" {F} knew it at once. No, {N} was faster.
"It has teeth but does not bite," {F} read aloud. {N} laughed. "That is a comb!"

@subplot?

Then they were stuck. {F} went left, {N} went right, and both came back with nothing.
But now the trail was gone. {N} sat down to think.
{F} wanted to give up, for {fhis} feet hurt.
The next clue was hard. They read it forward, and they read it backward.
They went in a circle and came back to the same stone.
"We are lost in a riddle," said {F} with a groan.

"Let us read it again, slowly," said {N}.
{N} held the paper against the light, and there were secret letters!
"Wait," said {F}. "What if we look at it upside down?"
{N} closed {his} eyes and listened. There was {sound}. That was the clue!
"It says look low, not high," said {N}. {F} dropped to {fhis} knees.
A beetle walked across the map and stopped at one corner. {N} stared. That was it!
---
"It must be {spot}!" said {N}.
The last words of the riddle could mean only one thing: {spot}.
"I have it," said {F}. "We must look {spot}."
{N} and {F} said it together: "It is hidden {spot}!"
All the clues pointed to one place, {spot}.
"Not there, silly," said {N} to {F}. "We have to look {spot}!"

They ran there and dug, and {N} felt something hard. It was a box!
There they found a small box, tied with string, and {F} shook it.
And truly, there was a tin, covered with leaves. {N} pulled it out.
{F} reached in up to the elbow and pulled out a wooden chest.
Sure enough, a little chest was waiting there for {N} and {F}.
Four {hands} dug as fast as they could, until {N} and {F} saw a lid.

Inside were {food} and a card: "For those who do not give up. With love from {E}."
It was full of {food}, and on top lay a note from {E}: "Well done!"
In it were two medals and a card from {E}. "For the best detectives," it said.
The box held no gold, but a book of riddles and a heap of {food}.
"Look!" cried {F}. There were two whistles, a bag of {food}, and a letter from {E}.
They opened it. There was a mirror with the words: "Here you see the treasure." {N} saw {himself} and {F} in it, side by side.
---
"It was {E} all the time!" said {N} and laughed.
"The search was even better than the treasure," said {F}, and {N} agreed.
{N} learned that a hard riddle only needs a second look.
They shared the treasure, half and half, as friends do.
"Now we will hide something for somebody else," said {N}.
{F} kept the map and {N} kept the box.

@end
"""
