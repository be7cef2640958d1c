"""The story writer's sentences: what every plot shares, and the plots, stage by stage.

How to read a plot: a blank line separates stages, `---` separates paragraphs. A stage is a list of
sentences, one a line, of which one is used; `?` alone on its first line makes the stage optional;
`@name` on its own stands for the shared stage of that name (`@name?`: optional). In a sentence
`[a|b|]` is a choice, `{N}` a slot (see `stories.Writer`), and a line that begins with `<tag>` is
used only in stories with that tag (`<!tag>`: without). Outside quotes, `he` and `she` always mean
somebody who is named in the same sentence, or, where nobody is, in the sentences before:
`story_check` relies on that.
"""

SHARED = {
    "open": """
<once>Once upon a time, there [was|lived] a {t} {k} named {N}[| who lived in a cozy {home}| who asked a hundred questions a day].
<once>Once upon a time, a {t} {k} named {N} lived in a [cozy|little|crooked|tidy] {home}.
<once>Once upon a time, in a [snug|tiny|warm] {home}, there lived a {t} {k} [called|named] {N}.
<once>Once upon a time, there was a {k} named {N}. {He} was [{t} and full of ideas|known for a big heart|always up before the sun].
<once>Once upon a time, [far away|not so long ago], a {k} named {N} [woke with a smile|had a very unusual day|opened one eye and then the other].
<!once>{N} was a {t} {k} [who loved mornings|who liked surprises|with a head full of questions|who could not sit still|with a very good memory].
<!once>In a [quiet|small|busy] village [by the sea|between two hills|at the end of a long road] lived a {t} {k} named {N}.
<!once>There was once a {t} {k} called {N}, who lived in a [snug|round|sunny|quiet] {home}.
<!once>"What a [fine|lovely|perfect] day!" said {N}, a {t} {k} [with bright eyes|who loved to explore|from the next village].
<!once>"[Hello, sun|Good morning, birds|Up, up, up]!" called {N}, a {t} {k} who [was never late|always woke early|talked to everything].
<!once>Have you heard about {N}? {N} was a {t} {k} who [lived in a little {home}|had a funny laugh|noticed everything].
<!once>Everybody knew {N} the {k}, because {he} [waved to everyone|hummed all day long|had the loudest laugh in town].
<!once>This is the story of a {t} {k} named {N}[|, and it is a true one|, and it begins at breakfast].
<!once>Long ago, when [clocks were slow|the hills were young|winters were white], there lived a {k} named {N}.
<!once>A {t} {k} named {N} [had just finished breakfast|was tying a knot in a string|sat on the step and listened to the birds].
""",
    "likes": """
{N} loved to [count clouds|collect leaves|draw maps|make up songs|look at the stars|ask why][| more than anything else| almost every day].
What {N} liked best was [the smell of fresh bread|the sound of rain|a good story|walking in the wind|a long, warm bath].
{He} had [two quick|two strong|two careful] {hands} and a [kind heart|sharp eye|thousand ideas].
Every day {he} [learned something new|found something to laugh about|said hello to the sun].
{N} could [whistle like a bird|stand on one leg|tell when rain was coming|name every star], and {he} was [a little|very|quite] proud of it.
On most days {N} [helped with the dishes|swept the floor|fed the birds] before {he} went out.
There was always a [nut|crumb|string|smooth stick] somewhere in {his} {home}, ready for the next plan.
{N} did not own much, but {he} [shared it gladly|knew a hundred games|was never bored].
""",
    "set": """
One {w} morning, {N} went {tp}.
One {w} [morning|afternoon], {N} [walked|skipped|wandered|hurried] all the way {tp}.
It was a {w} day, and {N} was {p}.
One {w} [afternoon|morning], {he} [set off|made {his} way] {tp} with a [light heart|snack in a small bag|tune on {his} lips].
[On Monday|On Tuesday|On Friday|On Saturday|On Sunday], {N} spent the whole {w} morning {p}.
The day was {w}, just right for a walk {tp}.
[After breakfast|After a late breakfast|As soon as {he} was dressed], {N} ran {tp}.
It happened on a {w} day {p}.
On the first {w} day of [spring|summer|autumn|the holidays], {N} could be found {p}.
""",
    "detail": """
How much there was to [look at|see|discover]: {see}, and {see2}, and more.
{N} could see {see}, and a bit farther on, {see2}.
From somewhere came {sound}.
{N} stopped to look at {see}. [Nothing could be better|How pretty it was|It was like a picture].
From where {he} stood, {he} could see {see} and hear {sound}.
[If one was very quiet|With a sharp ear|Now and then], one could hear {sound}.
{N} liked {see} [best of all|a great deal], but {he} was fond of {see2}, too.
The air [smelled fresh|was full of small sounds|felt soft], and {N} walked past {see2}.
<windy>The wind pulled at {his} ears, and it carried {sound}.
<sunny>The sun painted gold on {see}.
<misty>Thin mist hung over {see2} like a veil.
<cloudy>Grey clouds drifted by like a herd of sheep.
<warm>It was so warm that even {see2} seemed sleepy.
<cool>A cool breeze made {N} walk a little faster.
""",
    "friend": """
{His} best friend was {F}, a {ft} {fk}.
With {N} came {F} the {fk}, as always.
{F}, a {ft} {fk}, was [there too|not far away], because the two [did everything together|shared every adventure|never liked to be apart].
[Soon|Before long] a {ft} {fk} named {F} [came along|arrived], for they had planned to meet.
{N} had a good friend, a {ft} {fk} named {F}.
Nobody made {N} laugh as much as {F}, a {fk} from [next door|across the road|around the corner].
{N} was not alone. {F} the {fk} [walked|trotted] right beside {N}, as on most days.
A {ft} {fk} called {F} [waited there already|was waving from far off|had come early], and the two friends [hugged|grinned|bumped shoulders].
""",
    "meet": """
Just then, a {ft} {fk} named {F} came [by|along|around the corner].
[Soon|After a while|A little later], {N} met a {ft} {fk} named {F}.
"[Is something wrong|May I help|What is the matter]?" asked a [soft|friendly|small] voice. It was {F} the {fk}.
A {ft} {fk} [called|named] {F} had [heard everything|been watching] and came closer.
Not far away sat {F}, a {ft} {fk}, [eating lunch|mending a sock|reading the clouds].
{F} the {fk} [looked up|stopped at once] when {N} came near.
Who should come along but {F}, a {ft} {fk} [with a big smile|who was always glad to help|with time to spare]?
Along the path came a {fk}. "I am {F} the {fk}," said the newcomer[| in a friendly voice| and gave a little bow].
""",
    "subplot": """
<shower>A [quick|sudden|short] shower came down, and {N} got [wet from head to toe|soaked]. {He} waited under a [thick tree|wide roof] until the sun had dried {him} again.
<hunger>Then {his} stomach began to growl, because {he} had [skipped breakfast|eaten only one bite that morning]. Luckily {N} had packed some {food} in a small bag, and after {he} had eaten, {he} felt [strong|much better|full] again.
A [ladybug|butterfly|tiny moth] landed on {N}. "[Good day|Hello there], little one," {he} whispered, and it [opened its wings|stayed a while] before it flew on.
{N} [hummed|sang] a song about {food} and [rainbows|pirates|slow trains] to keep {his} spirits up. It had [nine|seven|twenty] verses, and each one was [sillier|longer|louder] than the last.
<out>There was a puddle in the way, so {N} took a long run and jumped. {He} landed right in the middle, splash, and laughed [out loud|at {himself}].
An old [woman|man] with a heavy sack needed [a rest|help], so {N} carried the sack for a while. "[Bless you|How kind of you], dear," came the answer, and {N} got a handful of {food} as a thank you.
{N} tripped over [a root|a stone|{his} own feet] and bumped a knee. It hurt, so {he} [blew|breathed] on it and [counted to ten|sang a silly rhyme], and then [it was better|the pain was gone].
<out>A feather-light seed floated past, and {N} followed it with {his} eyes until it was only a dot in the sky. {He} wondered [where it would grow|how far it would travel].
A [sparrow|robin|finch] hopped near [with its head to one side|without fear]. {N} gave it [a crumb|half a cracker], and it [chirped as if to say thanks|flew off with a happy chirp].
<snack>There was [time for a small snack|room for a little snack], too: {N} ate some {food} and kept [one|two] for later, because {he} was [careful|wise] that way.
<out>A [bee|wasp] buzzed around {N}. {He} stood [quite still|as still as a post], and soon it [lost interest|found a flower it liked better].
{N} saw a cloth bag [on the ground|lying about] and picked up the [litter|paper] next to it, because {he} liked things to be [tidy|clean].
A [goose|hen|sheep] with a [stern|funny] look stood right in the way and would not move. "[Good day, madam|Excuse me]," said {N} very politely, and only then was {he} allowed to [pass|go on].
<out>The wind blew off {his} cap, and {N} chased it [twice around a bush|down a bank|over a log]. When {he} caught it, {he} was [out of breath|red in the face].
<in>A [spider|beetle] hung on a thread and [swung|turned] slowly in the light. {N} [watched it for a while|said hello to it], then went on.
<snack>A baker came by and gave {N} [one warm roll|the end of a loaf], since there was [one too many|plenty]. {N} ate it while it was hot.
{N} tried to walk [backward|on {his} heels] for a bit, just to see how it felt. It felt [funny|wobbly], so {he} stopped.
Far away a clock struck [ten|eleven|twelve], and {N} counted [along|each stroke] and wondered [where the day had gone|how clocks know].
""",
    "thanks": """
"Thank you, {F}!" said {N}. "[I could not have done it alone|That was very kind of you|You are a true friend]."
"[You are the best|I will not forget this], {F}," said {N}, and {he} meant every word.
{N} hugged {F} [tightly|twice|for a long time].
{N} was so [grateful|glad] that {he} danced around {F} in a circle.
"How can I ever thank you?" asked {N}. "[Come and play with me tomorrow|Just smile|You already did]," said {F}.
{N} gave {F} [half|the bigger half] of the {food}, for good help should be thanked.
{F} laughed when {N} bowed very low. "[It was nothing|That is what friends are for|Any time]!"
""",
    "end": """
From that day on, {N} and {F} [met every week|were the best of friends|told the story again and again].
That evening, {N} walked home [slowly|with a happy heart|under the first stars] and [told {E} everything|slept very well|smiled all the way].
When the sun went down, {N} and {F} [went home|said good night], tired and [happy|content].
And when {N} lay in bed that night, {he} [smiled in the dark|was asleep before {he} could count to three|dreamed of {see}].
{N} [never forgot|always remembered] that day {p}.
And they all laughed until [their bellies hurt|the moon came up]. The end.
At home, {N} [drew a picture of it all|told the whole tale over supper|hung up {his} coat], and then {he} went to bed with a smile.
The two friends [watched the sunset|shared some {food}] and agreed that it had been a [very|truly] good day.
"[Same time tomorrow|Shall we meet again tomorrow]?" asked {F}. "Yes!" said {N}, and they both went home happy.
So the day ended [as well as it had begun|better than it had begun], and {N} was glad.
If you ever go {tp}, you may [meet|see] {N} and {F} there, still the best of friends.
[The stars came out one by one|The first stars came out|A round moon rose], and {N} [fell asleep|went to sleep] [with a warm feeling inside|thinking of {F}].
[Many days came after that|Weeks went by|There were many more adventures], but {N} [never forgot|always remembered] {F} and the [{w}|long] day {p}.
On the way home {N} [whistled|hopped|hummed], because {he} was so [happy|glad].
{E} asked, "[How was your day|What did you do today]?" "[It was the best day|It was wonderful]," said {N}, and {he} [smiled|was happy].
And that was that. {N} and {F} [are friends to this day|still laugh about it].
Later, over hot {dish}, {N} told {E} [about it|the story], and then it was time for [bed|dreams and a warm bed].
And so, with [a yawn and a smile|sleepy eyes and a happy heart], {N} said [good night|good night to the moon].
Back in the {home}, {N} [curled up|lay down] and thought, "[What a day|I wonder what tomorrow will bring]," and soon {he} was asleep.
""",
}

FIRST_PLOTS = {}

FIRST_PLOTS["lost"] = """
@open

@likes?

More than anything, {N} [loved|treasured] {his} {o}[|, a gift from {E}|, which {he} had found on {his} birthday].
{N} had a {o}, and {he} took it [everywhere|wherever {he} went|along on every walk].
{E} had given {him} a {o}, and {N} [was proud of it|looked after it well|showed it to everyone].
{His} favorite thing in the world was a {o}.
For {his} last birthday, {N} had got a {o}, and it was [lovely|just what {he} had wanted].
Nothing was dearer to {N} than {his} {o}.
---
@set

@detail?

<rolls>While {he} was [resting|looking the other way], the {on} began to roll, and it rolled out of sight.
<rolls>{N} put the {on} down for [just a moment|one minute], and it rolled away down the slope of the path.
<flies>All at once a gust of air [snatched|lifted] the {on} and carried it off.
<flies>A puff of wind took the {on}, and before {N} could grab it, it was gone.
<small>There was a hole in {his} pocket, and the {on} slipped out without a sound.
<small>The {on} was small, and somewhere it [dropped|fell] from {his} {hands}.
{N} played until noon. But when {he} looked for the {on}, it was [gone|not there].
{N} reached into {his} bag and gasped, for the {on} was missing.
When it was time for a rest, {N} noticed that {he} no longer had the {on}.
"Where is my {on}?" cried {N}. {He} looked left and right, but it was nowhere.

{He} was so sad that {his} lip trembled[, because it was {his} dearest thing|].
{His} eyes filled with tears. ["Oh no, oh no!" said {N}.|"I must find it," {he} said.]
{N} felt a lump in {his} throat, because {he} had [promised to take good care of it|loved it so much].
{N} stamped {his} foot, and then {he} began to cry a little.
{He} looked [high and low|here and there|in every corner], but it was [no use|all in vain].
{N} searched near {see}. [Nothing|No luck]. {He} searched again, and still there was nothing.
---
@subplot?

@meet

"I have lost my {o}," said {N}[| with a sniff| sadly].
"My {o} is gone," {N} [explained|said]. "I have looked everywhere."
"Have you seen a {o}?" asked {N}. "I lost it this morning."
{N} told {F} about the {o} and [wiped {his} nose|how it had vanished].
"I cannot find my {o} anywhere," said {N}, and {he} [sighed|sniffed].
"Please help me find my {o}," [begged|said] {N}.

"[Do not cry|Cheer up|Dear me]," said {F}. "I saw something {color} {spot}."
{F} thought hard. "Wait! I saw something {color} {spot} [just now|a while ago|when I came past]."
"A {o}?" said {F}. "I think I saw it {spot}."
"[Let me think|Hmm]," said {F}. "Yes! I saw it {spot}, and I wondered whose it was."
{F} [nodded|smiled]. "I saw it {spot}. Come, I will show you."
"Then you are lucky," said {F}, "for I saw it {spot} not long ago."
---
They [ran|hurried] there together, and sure enough, {spot} lay the {o}!
The two [went|walked] to have a look. There it was, {spot}: the {o}[|, safe and sound|, a bit dusty but whole]!
{N} bent down and looked {spot}. And there was the {o}, [just as {F} had said|waiting for {him}]!
Side by side they went to look, and {spot} [they found|they saw] the {o}.
{N} ran ahead of {F}, looked {spot}, and [shouted for joy|gave a happy cry]. {He} had found the {o}!
So they looked {spot}. "[Here it is|Hooray]!" shouted {N} and lifted up the {o}.

{N} held the {on} [tight|close] and [jumped up and down|laughed with relief|wiped it clean].
All the sadness was gone [at once|in a blink].
{N} was so happy that {he} turned in a circle [three times|like a top].
"[You have good eyes|You saved the day], {F}!" said {N}, and the {on} was [dusted off|kissed] at once.
{N} felt as light as air, now that the {on} was back.
{He} did not cry any more. Now {he} could only smile.

@thanks?
---
<small>That same day, {N} sewed up the hole in {his} pocket.
<flies>From then on, {N} tied a long string to the {on} whenever the wind blew.
<rolls>From then on, {N} never put the {on} down on a slope again.
{N} had learned that it is wise to ask for help when something is lost.
"Next time I will look after it better," {N} promised.
"Two pairs of eyes see more than one," said {F}, and {N} agreed.
{N} had learned to ask first and cry later.
And if anybody else lost something, {N} was the first to help them look.

@end
"""

FIRST_PLOTS["skill"] = """
@open

@likes?

There was one thing that {N} could not do, and that was {doing}.
{N} wanted to {do} [more than anything|very much], but {he} did not know how.
All {his} friends could {do}, but {N} [could not|had never learned it].
{N} dreamed of {doing}, [day and night|every single night].
"I wish I could {do}," {N} [said to {E}|said] [every day|at breakfast].
When {N} saw others {doing}, {he} [sighed|felt a little jealous].
---
@set

@detail?

@subplot?

It was the right day to try {doing}.
"Today I will learn to {do}," {N} [said|decided].
{He} took a deep breath and tried [to {do}|it for the first time].
[Nobody was watching|It was quiet there], so {N} made a first try at {doing}.
"It cannot be so hard to {do}," thought {N}.
{N} rolled up {his} sleeves, because today was the day for {doing}.

But oh dear, {fail}.
The first try went badly: {fail}.
It did not go well. On the first try, {fail}.
{fail_}. "[Ouch|Oh dear|Bother]!" {he} said.
Alas, {fail}, and [a crow laughed|two pigeons stared].
{N} tried once, twice, three times. Each time it was the same: {fail}.

{N} felt [ashamed|like giving up], and {he} [kicked a stone|hung {his} head].
"I will never learn it," {he} said and [sat down|sighed deeply].
{His} cheeks grew hot. {He} almost [gave up|went home].
{N} was cross, because {he} had thought it would be easy.
"I am no good at {doing}," [groaned|said] {N}.
Two big tears ran down {his} face.
---
@meet

"I cannot {do}," said {N}. "[Every try goes wrong|I have tried all day]."
{N} told {F} [all about it|what had gone wrong].
"Do you know how to {do}?" asked {N}. "[Oh yes|I do]," said {F}.
"[Nobody can do it at first|I could not do it at first either]," said {F} when {N} had explained.
"Were you trying to {do}?" asked {F}, and {N} nodded [sadly|with red ears].
{F} had seen it all, but {fhe} did not laugh at {N}.

"Here is the secret," said {F}. "{tip}."
"{tip}," said {F}. "[That is all|The rest will come]."
{F} [smiled|winked]. "{tip}. That is what my {elder} taught me."
"May I tell you something?" said {F}. "{tip}."
"I fell a hundred times," said {F}, "before somebody told me this: {tip}."
{F} showed {N} how. "Watch me. {tip}."
---
So {N} tried again. And again. [The sun moved across the sky|An hour went by|Slowly it got better].
All afternoon {N} practiced, and {F} [cheered|clapped] after each try.
{N} practiced [the next day, and the day after that|for a whole week], and every time {he} got a little better.
"Once more!" said {F}, each time {N} wanted to stop.
{N} listened to {F}, tried again, and [stumbled|failed] only a little.
The second try was better, and the third was better still.

And then, at last, {good}!
Suddenly, {good}!
And what do you think? {good_}!
Then came the moment: {good}, and {F} [cheered|jumped for joy].
On the [tenth|twentieth|hundredth] try, {good}.
{N} closed {his} eyes, remembered the advice, and did it. {good_}!

"I can {do}!" shouted {N}. "[Look at me|I really can]!"
{N} was so proud that {he} [glowed|could have burst].
{F} clapped {fhis} {fhands}. "I knew it!"
"You did it!" cried {F}. "[All by yourself|And so well]!"
{N} laughed and did it [again at once|three times more], just for fun.
{N} could hardly believe it, but it was true.
---
"It only needed practice," said {N}, and {F} nodded.
Now {N} knew that [every master was a beginner once|practice makes hard things easy].
Later, when a smaller {fk} wanted to {do}, {N} [was the teacher|helped with a kind word].
{N} had learned that mistakes are [only steps on the way|part of learning].
"What shall we learn next?" asked {F}, and {N} had [ten|many] ideas.
{N} never said "I cannot" again. {He} said "I cannot yet."

@end
"""

FIRST_PLOTS["storm"] = """
@open

@likes
---
@set

@friend

@detail?

@subplot?

They [played tag|flew from game to game|built a tiny dam] and did not look at the sky.
{N} and {F} were [so deep in their game|so busy with hide and seek] that they forgot the time.
{N} and {F} had a picnic of {food}, and nobody looked up.
"[Let us go a little farther|One more game]," said {F}, and {N} [agreed|ran ahead].
The two were looking for [round stones|four-leaf clover|animal tracks], and they walked and walked.
{N} and {F} lay on their backs and made up stories about pirates.
---
Then the sky turned [dark|as grey as slate|black], and [thunder rolled|the birds fell silent].
All at once, big drops began to fall. [Boom, went the thunder|Lightning lit up the sky].
A cold wind rose, and dark clouds [rushed|piled] up from the west.
Suddenly there was a flash, and then a crash, so loud that the ground shook.
First came one drop, then ten, and then the whole sky seemed to fall down.
"Was that thunder?" asked {F}. It was, and the rain came right behind it.

{N} was frightened, because {he} had never seen [such a storm|so much rain].
"I am scared," [whispered|said] {F}, and {fhe} [shivered|held on to {N}].
{N} wanted to run, but {he} could hardly see the way.
In a moment both of them were wet to the skin.
The rain was so thick that {N} could not see {F} [any more|at all], though {he} could hear {fhim}.
{F} jumped at every flash, and {fhis} {fhands} were cold.

"We must not stand under a tall tree," said {N}. "{E} told me so."
"Hold my hand," {N} said to {F}. "We stay together."
"[Stay calm|Do not run]," said {N}. "Let us think first."
"Storms pass," said {F}. "We only need a dry place."
{N} took a deep breath and [counted|began to count] the seconds from flash to boom.
"Look for a low, dry place," {F} called.
---
They [crawled|crept] into a small cave in the rocks, where it was dry.
There was an empty shed close by, and they slipped inside[ and shut the door|].
{F} found an old hut with a good roof, and they [pushed the door open|went in].
Bent low, they ran to a stone hut and [squeezed in|tumbled through the door].
{N} saw a light. It was a little house, and a kind old woman let them in.
Under a wide rock there was room for two, so they sat down there.

Inside, they [sang every song they knew|told each other jokes|ate the last of the {food}] while the storm [raged|howled] outside.
{N} told {F} a story about a cloud that sneezed, and {fhe} forgot to be afraid.
They counted between flash and thunder: three, then five, then ten. The storm was moving away.
{F} wrapped {fhis} coat around them both, and {N} stopped shivering.
"A storm is only sky noise," said {N}, and {F} [giggled|felt better].
They sat close together, and so neither of them was cold.
---
[At last|After an hour|Little by little], the rain stopped, and the sun came out again.
When they looked out, there was a rainbow [over the hills|from one end of the sky to the other].
The thunder grew [faint|soft], and then there was only a drip, drip, drip.
As quickly as it had come, the storm was over.
The clouds broke open, and a warm light fell on everything.
Outside, the whole world [shone|sparkled] as if it had been washed.

Because they were still wet, they went [straight back|to {N}'s {home}] to get dry.
{E} was [waiting with towels|at the door already] and made hot {dish} for both.
They [jumped|stamped] through every puddle on the way back, for they could not get wetter.
At home there were dry clothes and a hot drink for each of them.
"You did everything right," said {E}, and gave each a warm towel.
{E} rubbed them dry and wanted to hear [every word|all of it].
---
"Together we were not so scared," said {N}, and {F} nodded.
{N} had learned that a calm head is the best roof in a storm.
After that, {N} always [looked at the sky|looked up] before a long game.
{N} thought that storms were rather grand, as long as one had a friend near.
"You were brave," said {F}. "So were you," said {N}.
{F} drew the rainbow, and {N} hung it on the wall.

@end
"""

FIRST_PLOTS["mend"] = """
@open

@likes?

{N} owned a {o}, which [had belonged to {E}|was older than {he} was].
On the shelf stood a {o}, and {N} [liked it very much|was proud of it].
{N} had saved for a long time to buy a {o}.
{E} had made a {o} for {N} [with much love|last winter].
Wherever {N} went, {his} {o} went too.
{N} and {his} {o} were hardly ever apart.
---
@set

@detail?

But {N} was [in a hurry|not careful], and the {on} fell to the ground. Crack!
{N} [slipped|stumbled], and the {on} hit a stone. There was an ugly sound.
Then {N} leaned back to rest, right onto the {on}. Crunch!
The {on} got stuck, {N} pulled too hard, and it broke in two.
Just then somebody shouted, {N} jumped, and down went the {on}.
{N} wanted to show how strong the {on} was, and so it broke.

"It is broken," [whispered|sobbed] {N}. ["And it is my own fault."|"What will {E} say?"]
{N} picked up the pieces with [trembling|careful] {hands}.
{N} stared at the {on}. {He} wished that {he} could turn back time.
A big piece had come off, and {N} felt [terrible|very sad].
{N} put the pieces into a bag and [trudged on|sat down beside it].
Tears dropped on the broken {on}.

@subplot?
---
@meet

"[Throw it away and get a new one|It is only a thing], some would say," said {F}. "But I think we can mend it."
{F} looked at the broken {o} from all sides. "[I have seen worse|That is not hopeless]," {fhe} said.
"What broke can often be fixed," said {F}. "Show me."
"A {o}!" said {F}. "[My {elder}|My uncle] taught me how to mend such things."
"Let me see," said {F}, and {fhe} [turned it around|held it to the light].
"Do not give up yet," {F} said. "We need some [glue|wire|string], that is all."

They fetched [glue and a thin string|a pot of glue|wire and a small hammer|some tape and a brush].
{F} had a box full of useful bits[: screws, pins, thread and glue|].
First they [cleaned|washed] every piece and laid it out in order.
{N} held the pieces together while {F} [spread the glue|tied the string].
"You hold, I glue," said {F}, and {N} held as still as a stone.
The work was slow. {N} had to [hold {his} breath|be patient], and {F} had to try three times.
---
Then they waited [until it was dry|a whole hour], which was the hardest part.
"Do not touch it yet," said {F}, so {N} sat on {his} {hands}.
While it dried, {N} and {F} [ate some {food}|told riddles].
The glue had to dry, so they [played a quiet game|watched the clouds go by].
At last {N} gave it a careful [tap|push]. It held!
{F} counted to one hundred, and then {N} was allowed to look.

The {on} was whole again, with only a thin line to show where it had been broken.
The {on} looked [almost like new|even better than before]!
"It works!" cried {N}. The {o} was as good as new.
One could still see the crack, but {N} thought it made the {on} special.
And there stood the {o}, all in one piece.
{N} painted a tiny star over the crack in the {on}[, so that it looked like new|].

@thanks?
---
{N} learned that broken does not mean lost.
From then on, {N} carried the {on} with both {hands}.
"Now I know how to mend things," said {N}. Soon neighbors came with [cups and chairs|toys and shoes] to be fixed.
"Mended things have a story," {F} said, and {N} liked that.
When {N} told the truth about it at home, {E} [was not angry|was proud of the repair].
After that {N} kept a little pot of glue, just in case somebody needed it.

@end
"""

FIRST_PLOTS["surprise"] = """
@open

@friend

@likes?
---
Soon it would be {F}'s birthday, and {N} wanted to give {fhim} a surprise.
"{F} has a birthday [tomorrow|this week]," thought {N}. "It must be a real surprise!"
{F} had been sad lately, because {fhe} had never had a {on}, and {N} had noticed.
{N} had a secret. {He} was planning a party for {F}.
{E} whispered to {N}, "It is {F}'s birthday on Sunday. What will you give?"
{N} marked the day on the wall, because {F} would be one year older.

{N} had saved [six|nine|ten] coins, and {he} bought a {o}.
In a shop window {N} saw a {o}. That was it!
{N} worked [three evenings|all week] and made a {o} {himself}.
{N} swept floors for a neighbor, and for the money {he} bought a {o}.
{N} remembered that {F} had always wished for a {o}, so {he} got one.
{E} knew where to get a {o}, and {N} wrapped it in paper with stars.

Now the {on} had to be hidden, and {N} hid it {p}, {spot}.
{He} hid the {on} {spot} and told [nobody|only {E}].
"Nobody will look {spot}," thought {N}, and {he} put the {on} there.
So {N} went {tp} and put the {on} {spot}, where nobody would see it.
[Quick as a wink|On tiptoe], {N} went {tp} and tucked the {on} away {spot}.
The best hiding place was {p}, {spot}, and there {N} left the {on}.
---
@subplot?

It was hard to keep the secret. When {F} asked, "[What are you smiling about|What are you up to]?" {N} said, "Oh, nothing."
{F} asked {N} to come and play, but {he} said, "[Not today|I am busy]." {F} went away with a [long face|sad look].
"You are hiding something," said {F}. {N} [bit {his} lip|turned red] and said nothing.
{F} thought that {fhis} birthday had been forgotten, and {fhe} [sighed|felt lonely].
{N} almost told {F} twice, but each time {he} bit {his} tongue just in time.
For [two days|three days] {N} avoided {F}, because {his} face could not keep a secret.

{N} baked a cake with {food} on top, and {E} [helped|lent a hand].
{N} hung up [paper stars|bright flags|chains of flowers] and made hot {dish}.
Meanwhile the neighbors practiced the birthday song [in whispers|very softly].
{N} wrote a card. It said: "For the best friend in the world."
{E} brought {food} and a [big candle|jug of juice].
A table was set with {food}, cups and candles.
---
At last the day came. "Close your eyes," said {N} to {F}, and led {fhim} {tp}.
When the day came, {N} took {F} {tp}. "Look {spot}," {he} said.
On the morning of the party, {N} gave {F} a map that led {tp}.
"Follow me," said {N} at last, and the two walked {tp}.
When everything was ready, {N} fetched {F}, and they went {tp}.
{N} tied a cloth over {F}'s eyes and led {fhim} {tp}.

"Surprise!" everybody shouted. And there, {spot}, {F} found the {o}.
{F} looked {spot}, and {fhis} mouth fell open. There was the {o}!
"Surprise!" called {N}, and {F} found the {o} {spot}.
"Now look {spot}!" said {N}. {F} looked, and pulled out the {o}.
{F} reached [slowly|carefully] into the hiding place {spot} and took out the {o}.
"Is that for me?" asked {F} and picked up the {o} that lay {spot}.

"I thought you had all forgotten me," said {F}, and {fhe} laughed and cried at once.
"[It is perfect|It is just what I wished for]!" {F} [said|cried].
{F} hugged the {on}, and then {fhe} hugged {N}.
{F} was so happy that {fhe} could not speak.
"So that was your secret," said {F} with a [wide|big] grin.
{F} danced about with the {on}, and everybody [clapped|sang].
---
{N} found that giving a present is as nice as getting one.
"Keeping quiet was the hardest thing I have ever done," said {N}.
They ate {food} until not a crumb was left.
{N} was happy because {F} was happy.
{F} kept the card [by {fhis} bed|for the rest of {fhis} life].
"Your birthday is next," said {F} to {N} and winked.

@end
"""

FIRST_PLOTS["sharing"] = """
@open

@likes?

{E} had given {N} a basket of {food} [for the day|to take along].
{N} had picked a whole basket of {food}, all by {himself}.
That day {N} had a bag with [seven|eight|a dozen] {food} in it.
At breakfast {N} packed {food}, [more than {he} could eat|the best in the land].
{N} had found [ripe|fresh] {food} and filled {his} bag to the top.
A neighbor had thanked {N} for some help with a bag of {food}.
---
@set

@detail?

@subplot?

{N} found a [shady|quiet] spot and sat down to eat. "All for me!" {he} said.
"I will eat every one of them," {N} thought and licked {his} lips.
{He} was hungry from the walk, so {N} opened the bag.
{N} spread a cloth and put the {food} in a neat row.
The {food} smelled so good that {N} could not wait.
"One for now and the rest for later," said {N} and began to eat.
---
@meet

{F} looked at the {food}, and {fhis} stomach [growled|rumbled] loudly.
"I have had nothing to eat since yesterday," said {F} softly.
"Those look [good|delicious]," said {F}. "I lost my lunch [on the way|in a ditch]."
{F} did not ask for any, but {fhe} looked [very hungry|thin and tired].
"I have walked since dawn," said {F}, "and my bag is empty."
"Oh, {food}!" said {F}, and swallowed.

{N} looked at the {food}. There were not so many. {He} [held the bag tightly|pulled the bag closer].
"They are mine," thought {N}. But then {he} saw how {F} looked at the ground.
At first {N} said nothing. {He} had wanted to keep them all.
{N} remembered a day when {he} {himself} had been hungry.
What would {E} do? {N} did not have to think for long.
{N} took one bite, but it did not taste so good while {F} had none.

"Here," said {N}. "Half of them are for you."
"Sit down and eat with me," said {N}, and {he} gave {F} [the biggest one|a good handful].
{N} made two heaps: one for {F}, one for {himself}.
"One for you, one for me," {N} counted, until the bag was empty.
{N} held out the bag. "Take as many as you like, {F}."
"There is enough for two," said {N}, and moved over.

{F} ate, and [color came back to {fhis} cheeks|{fhis} eyes began to shine].
"[Mmm|Oh, how good]," said {F} with a full mouth. "Thank you!"
They ate side by side, and the {food} tasted better than ever.
Now {F} was not hungry any more, and neither was {N}.
{F} licked {fhis} {fhands} and smiled at {N}.
Soon nothing was left but crumbs, and the birds got those.
---
"Now I will share something with you," said {F}, and showed {N} [a secret path|a hidden swing|a hole full of fireflies].
In return {F} taught {N} [a whistle trick|a new game with stones|a funny song].
"I have no food," said {F}, "but I have a story." And it was the best story {N} had ever heard.
{F} knew where the [ripest|sweetest] {food} grew, and now {N} was allowed to know it too.
Then {F} took out a {o}. "We can both play with it," {fhe} said to {N}.
The next day {F} came back with hot {dish} for {N}, because {fhe} had not forgotten.

They had [so much|such] fun that the time flew.
{N} had [half as many {food}|fewer {food} now], but twice as much joy.
They played until [their legs were tired|the shadows grew long].
"I came with {food} and I go with a friend," thought {N}.
Both of them laughed a great deal that day.
{N} was glad that {he} had not eaten everything alone.
---
Since then {N} always packs [a little more|two spoons], because you never know whom you will meet.
{N} had learned that sharing does not make things less. It makes them more.
"Half a treat with a friend is better than a whole one alone," said {N}.
Whenever {N} eats {food}, {he} thinks of that day.
"Tomorrow I will bring the lunch," [promised|said] {F}, and {fhe} did.
{E} was proud when {N} came home with an empty bag.

@end
"""
