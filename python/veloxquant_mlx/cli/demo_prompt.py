"""The text that the demo reads, written for it, and the question about it."""

_TEXT = """\
The history of calculus is longer than the quarrel for which it is famous. Its two questions are old: how to find the \
area of a figure that is bounded by curves, and how to find the line that touches a curve at a point. The first was \
asked by anyone who had to measure a field or fill a barrel, and the second by those who wished to know how a thing \
moves at an instant, when an instant leaves no time to move in.

In the fourth century before our era, Eudoxus of Cnidus answered the first question for some figures by what was later \
called the method of exhaustion. A circle is squeezed between two polygons, one inside and one outside. If the number \
of sides is doubled often enough, the difference between the two becomes smaller than any area that one cares to name, \
and so the area of the circle cannot be other than it is. Archimedes of Syracuse used the method with unequalled skill. \
He showed that a segment of a parabola has four thirds of the area of the largest triangle inside it, that the surface \
of a sphere is four times its greatest circle, and that the number that we call pi lies between 3 10/71 and 3 1/7. In a \
letter to Eratosthenes, lost for centuries and found again in 1906 under the text of a prayer book, he explained how he \
had guessed these results: he imagined the figures cut into slices and weighed them, slice by slice, on a balance.

The work did not stop when the ancient schools closed. Ibn al-Haytham, who wrote in Cairo around the year 1020, found \
the sum of the fourth powers of the first whole numbers and used it to compute the volume of a solid made by turning a \
parabola. In Kerala, in the south of India, Madhava and his followers wrote the sine, the cosine and the arctangent as \
sums without end, some two hundred and fifty years before anyone in Europe did so, and they estimated the error that \
is made by stopping early. In Paris and in Oxford, scholars of the fourteenth century argued about bodies whose speed \
grows evenly; Nicole Oresme drew the speed as a line over time, and saw that the distance travelled is the area below.

In the seventeenth century the pace quickened. Johannes Kepler, who had bought wine for his second wedding and mistrusted \
the way in which the merchant measured the barrels, published a book about their volumes in 1615. Bonaventura Cavalieri, \
a pupil of Galileo, treated an area as the sum of all its lines, and obtained with this doubtful idea results that were \
not doubtful at all. Pierre de Fermat found the largest and the smallest values of an expression by changing the unknown \
a little, dividing by the change, and then letting the change vanish; the same trick gave him tangents. John Wallis \
computed areas with products that never end, and Isaac Barrow, who held the chair of mathematics at Cambridge, proved in \
the language of geometry that the problem of tangents and the problem of areas are each other's inverse.

Barrow's successor was Isaac Newton. In the years 1665 and 1666, when the university was closed because of the plague, \
Newton worked at his mother's house in Lincolnshire on what he called the method of fluxions. A quantity that flows has a \
speed, its fluxion; from the one the other can be found, in both directions, and with the binomial series almost every \
curve then known could be handled. He showed the work to a few friends and printed nothing about it for decades. Gottfried \
Wilhelm Leibniz, a lawyer, librarian and diplomat in the service of Hanover, came to the same ideas by another road while \
he lived in Paris, between 1672 and 1676. He published first, in 1684, in six difficult pages, and he chose his signs with \
care: the letter d for a difference and a long s for a sum are the signs that we still write. Each had found the method by \
himself, but their followers accused one another of theft, and in 1712 a committee of the Royal Society, whose report \
Newton had secretly written, decided in favour of Newton. British mathematicians kept to his notation out of loyalty and \
lost a century by it. On the continent the brothers Jakob and Johann Bernoulli, and after them Leonhard Euler, turned the \
new method into a tool for every problem of mechanics, from the shape of a hanging chain to the motion of the Moon.

What was missing was a reason why it worked. In 1734 George Berkeley, an Irish bishop, mocked the vanishing increments as \
the ghosts of departed quantities, and he had a point: one divided by them as if they were something, and dropped them as \
if they were nothing. The answer took a hundred years. Augustin-Louis Cauchy built the subject on the notion of a limit in \
the lectures that he printed in 1821; Bernard Bolzano in Prague had similar ideas, which few people read; and Karl \
Weierstrass in Berlin gave the definitions with epsilon and delta that students learn today. Bernhard Riemann said in 1854 \
exactly what an integral is, and Henri Lebesgue, in 1902, found a better answer that covers far more functions.
"""

QUESTION = (
    "In a few sentences: what did Newton and Leibniz each contribute to calculus, "
    "and what did their followers quarrel about?"
)
PROMPT = f"Read the following text.\n\n{_TEXT}\n{QUESTION}"
