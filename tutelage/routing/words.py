"""English words that turn a question into another one, as values. It refuses to know what is done with them."""

NEGATIONS = """
not no never none nobody nothing neither nor without cannot cant dont doesnt didnt isnt arent wasnt werent wont wouldnt shouldnt couldnt
hasnt havent hadnt except unless stop avoid prevent kein keine keinen nicht nie niemals ohne pas jamais sans aucun nunca sin ningún
ninguna
"""
OPPOSITES = """
on/off in/out up/down enable/disable enabled/disabled start/stop open/close opened/closed open/closed increase/decrease
increasing/decreasing raise/lower gain/lose add/remove insert/delete install/uninstall connect/disconnect buy/sell buying/selling
import/export push/pull upload/download encrypt/decrypt encode/decode lock/unlock mount/unmount accept/reject allow/deny allow/forbid
allow/block grant/revoke show/hide expand/collapse before/after first/last earlier/later early/late old/new oldest/newest oldest/latest
young/old more/less most/least more/fewer max/min maximum/minimum high/low higher/lower highest/lowest large/small larger/smaller
largest/smallest big/small bigger/smaller biggest/smallest long/short longer/shorter longest/shortest fast/slow faster/slower tall/short
taller/shorter hot/cold warm/cool heavy/light thick/thin best/worst better/worse good/bad advantages/disadvantages advantage/disadvantage
pros/cons benefits/risks benefit/risk positive/negative true/false always/never all/none legal/illegal possible/impossible safe/dangerous
safe/unsafe healthy/unhealthy male/female men/women man/woman boy/girl boys/girls husband/wife father/mother son/daughter brother/sister
king/queen left/right north/south east/west northern/southern eastern/western above/below over/under inside/outside top/bottom front/back
win/lose winning/losing success/failure succeed/fail pass/fail love/hate like/dislike like/hate remember/forget attack/defend
public/private internal/external input/output read/write send/receive give/take teach/learn lend/borrow ask/answer create/delete
create/destroy build/destroy ascending/descending horizontal/vertical odd/even multiply/divide subtract/add rich/poor asset/liability
debit/credit arrival/departure arrive/depart arrive/leave login/logout sunrise/sunset summer/winter day/night morning/evening
morning/night today/tomorrow today/yesterday monday/tuesday with/without
"""
# of no weight in a question
COMMON = """
a an the and or but if then than so as of at by for with about against between into through during before after above below to from up
down in out on off over under again further once here there all any both each few more most other some such only own same too very can
will just should now is are was were be been being am do does did doing done have has had having i me my we our you your he him his she
her it its they them their this that these those what which who whom whose when where why how would could might may must shall get got
make made much many one ones someone something anything people person way ways thing things please tell know explain give let us also ever
even really actually
"""
# a line: how a unit or currency is written
UNITS = """
km kms kilometer kilometers kilometre kilometres
mile miles mi
meter meters metre metres m
cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres
inch inches
foot feet ft
yard yards
kg kgs kilogram kilograms kilo kilos
gram grams g
mg milligram milligrams
pound pounds lb lbs
ounce ounces oz
liter liters litre litres l
ml milliliter milliliters
gallon gallons
celsius
fahrenheit
kelvin
second seconds sec secs
minute minutes min mins
hour hours hr hrs
day days
week weeks
month months
year years
dollar dollars usd
euro euros eur
rupee rupees rs inr
yen jpy
gbp sterling
byte bytes
kb kilobyte kilobytes
mb megabyte megabytes
gb gigabyte gigabytes
tb terabyte terabytes
percent percentage
watt watts
volt volts
amp amps
"""
SIGNS = {"$": "dollar", "€": "euro", "₹": "rupee", "£": "gbp", "¥": "yen", "%": "percent"}
# a line: how a number is written from zero on; "one" is left out, for "the one" is no number
NUMERALS = """
zero
-
two ii
three iii
four iv
five
six vi
seven vii
eight viii
nine ix
ten
eleven xi
twelve xii
thirteen
fourteen
fifteen
sixteen
seventeen
eighteen
nineteen
twenty
"""
LARGE = {"hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000", "lakh": "100000", "crore": "10000000"}
