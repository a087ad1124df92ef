package segment_test

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the test needs no time zones of the machine

	"sallyport.dev/segment"
)

func window(t *testing.T, from, to, zone string, days ...time.Weekday) segment.Window {
	t.Helper()
	w := segment.Window{Days: days}
	var err error
	for s, into := range map[string]*segment.TimeOfDay{from: &w.From, to: &w.To} {
		if *into, err = segment.ParseTimeOfDay(s); err != nil {
			t.Fatal(err)
		}
	}
	if w.Zone, err = time.LoadLocation(zone); err != nil {
		t.Fatal(err)
	}
	return w
}

// Each line is when a grant with a window begins and ends to hold, from a moment on, as it follows from Holds alone.
func TestWindows(t *testing.T) {
	const mon, fri, sat, sun = time.Monday, time.Friday, time.Saturday, time.Sunday
	every := []time.Weekday{sun, mon, 2, 3, 4, fri, sat}
	for _, c := range []struct {
		what   string
		window segment.Window
		from   string // UTC
		want   string // edges, UTC
	}{
		{"a day", window(t, "08:00", "18:00", "UTC", mon), "2026-06-01T00:00:00Z", "06-01T08:00 on, 06-01T18:00 off, 06-08T08:00 on, 06-08T18:00 off"},
		{"from within", window(t, "08:00", "18:00", "UTC", mon), "2026-06-01T12:00:30Z", "on, 06-01T18:00 off, 06-08T08:00 on"},
		{"elsewhere", window(t, "08:00", "18:00", "Asia/Kathmandu", mon), "2026-06-01T00:00:00Z", "06-01T02:15 on, 06-01T12:15 off"},
		{"over midnight, from the day on that it begins", window(t, "22:00", "06:00", "UTC", fri), "2026-06-04T00:00:00Z", "06-05T22:00 on, 06-06T06:00 off, 06-12T22:00 on, 06-13T06:00 off"},
		{"over the end of the week", window(t, "22:00", "06:00", "UTC", sat), "2026-06-06T00:00:00Z", "06-06T22:00 on, 06-07T06:00 off"},
		{"to midnight", window(t, "22:00", "24:00", "UTC", fri), "2026-06-04T00:00:00Z", "06-05T22:00 on, 06-06T00:00 off"},
		{"to midnight, in other words", window(t, "22:00", "00:00", "UTC", fri), "2026-06-04T00:00:00Z", "06-05T22:00 on, 06-06T00:00 off"},
		{"two days without a seam", window(t, "00:00", "24:00", "UTC", sat, sun), "2026-06-04T00:00:00Z", "06-06T00:00 on, 06-08T00:00 off"},
		{"no day", window(t, "00:00", "24:00", "UTC"), "2026-06-04T00:00:00Z", ""},

		// In Berlin there is no 02:00 to 03:00 on 29 March (01:00 UTC), and two on 25 October (00:00 to 02:00 UTC).
		{"before the gap", window(t, "01:00", "02:00", "Europe/Berlin", sun), "2026-03-29T00:00:00Z", "on, 03-29T01:00 off, 04-04T23:00 on"},
		{"in the gap", window(t, "02:00", "03:00", "Europe/Berlin", sun), "2026-03-29T00:00:00Z", "04-05T00:00 on, 04-05T01:00 off"},
		{"into the gap", window(t, "01:30", "02:30", "Europe/Berlin", sun), "2026-03-29T00:00:00Z", "03-29T00:30 on, 03-29T01:00 off"},
		{"out of the gap", window(t, "02:30", "03:30", "Europe/Berlin", sun), "2026-03-29T00:00:00Z", "03-29T01:00 on, 03-29T01:30 off"},
		{"over the gap", window(t, "01:30", "03:30", "Europe/Berlin", sun), "2026-03-29T00:00:00Z", "03-29T00:30 on, 03-29T01:30 off"},
		{"a night with the gap", window(t, "22:00", "06:00", "Europe/Berlin", sat), "2026-03-28T12:00:00Z", "03-28T21:00 on, 03-29T04:00 off, 04-04T20:00 on"},
		{"in the overlap", window(t, "02:00", "03:00", "Europe/Berlin", sun), "2026-10-24T12:00:00Z", "10-25T00:00 on, 10-25T02:00 off, 11-01T01:00 on"},
		{"into the overlap", window(t, "01:30", "02:30", "Europe/Berlin", sun), "2026-10-24T12:00:00Z", "10-24T23:30 on, 10-25T00:30 off, 10-25T01:00 on, 10-25T01:30 off"},
		{"out of the overlap", window(t, "02:30", "03:30", "Europe/Berlin", sun), "2026-10-24T12:00:00Z", "10-25T00:30 on, 10-25T01:00 off, 10-25T01:30 on, 10-25T02:30 off"},
		{"half an hour back", window(t, "01:30", "01:45", "Australia/Lord_Howe", sun), "2026-04-04T00:00:00Z", "04-04T14:30 on, 04-04T14:45 off, 04-04T15:00 on, 04-04T15:15 off"},
		{"half an hour forward", window(t, "02:00", "02:30", "Australia/Lord_Howe", sun), "2026-10-03T00:00:00Z", "10-10T15:00 on, 10-10T15:30 off"},
		// Samoa went from 29 to 31 December 2011: there was no Friday.
		{"no such day", window(t, "12:00", "13:00", "Pacific/Apia", fri), "2011-12-28T00:00:00Z", "01-05T22:00 on, 01-05T23:00 off"},
		{"a day less", window(t, "12:00", "13:00", "Pacific/Apia", every...), "2011-12-29T00:00:00Z", "12-29T22:00 on, 12-29T23:00 off, 12-30T22:00 on"},
	} {
		g := segment.Grant{Windows: []segment.Window{c.window}}
		now, err := time.Parse(time.RFC3339, c.from)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		was, end := false, now.Add(16*24*time.Hour)
		for now.Before(end) {
			holds, until := g.Holds(now)
			switch {
			case holds != was && len(got) == 0 && now.Format(time.RFC3339) == c.from:
				got = append(got, "on")
			case holds != was:
				got = append(got, now.UTC().Format("01-02T15:04")+map[bool]string{true: " on", false: " off"}[holds])
			}
			if until.IsZero() {
				break
			}
			if !until.After(now) {
				t.Fatalf("%s: at %s it holds until %s", c.what, now, until)
			}
			for at := now; at.Before(until) && at.Before(end); at = at.Add(time.Minute) {
				if is, _ := g.Holds(at); is != holds {
					t.Fatalf("%s: it should be %t until %s, and changes at %s", c.what, holds, until, at)
				}
			}
			was, now = holds, until
		}
		if all := strings.Join(got, ", "); !strings.HasPrefix(all, c.want) || (c.want == "") != (all == "") {
			t.Errorf("%s: %s, not %s", c.what, all, c.want)
		}
	}
}

func TestGrantHolds(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 6, n, 0, 0, 0, 0, time.UTC) }
	noon := []segment.Window{window(t, "12:00", "13:00", "UTC", 0, 1, 2, 3, 4, 5, 6)}
	for _, c := range []struct {
		what  string
		grant segment.Grant
		now   time.Time
		holds bool
		until time.Time
	}{
		{"always", segment.Grant{}, day(1), true, time.Time{}},
		{"before its end", segment.Grant{Expires: day(2)}, day(2).Add(-1), true, day(2)},
		{"at its end", segment.Grant{Expires: day(2)}, day(2), false, time.Time{}},
		{"before it begins", segment.Grant{NotBefore: day(2), Expires: day(3)}, day(1), false, day(2)},
		{"as it begins", segment.Grant{NotBefore: day(2), Expires: day(3)}, day(2), true, day(3)},
		{"begins for ever", segment.Grant{NotBefore: day(2)}, day(2), true, time.Time{}},
		{"ends before it begins", segment.Grant{NotBefore: day(3), Expires: day(2)}, day(2), false, time.Time{}},
		{"in its window", segment.Grant{Windows: noon}, day(1).Add(12 * time.Hour), true, day(1).Add(13 * time.Hour)},
		{"ends in its window", segment.Grant{Windows: noon, Expires: day(1).Add(12*time.Hour + time.Second)}, day(1).Add(12 * time.Hour), true, day(1).Add(12*time.Hour + time.Second)},
		{"begins out of its window", segment.Grant{Windows: noon, NotBefore: day(1)}, day(1), false, day(1).Add(12 * time.Hour)},
		{"a window that says nothing", segment.Grant{Windows: []segment.Window{{}}}, day(1), false, time.Time{}},
	} {
		if holds, until := c.grant.Holds(c.now); holds != c.holds || !until.Equal(c.until) {
			t.Errorf("%s: %t until %s", c.what, holds, until)
		}
	}
}

func TestSays(t *testing.T) {
	w := window(t, "08:00", "18:00", "Europe/Berlin", 1, 2)
	same := window(t, "08:00", "18:00", "Europe/Berlin", 1, 2)
	a, b := segment.Grant{Windows: []segment.Window{w}}, segment.Grant{Windows: []segment.Window{same}, Owner: "me", Pos: segment.Pos{Line: 1}}
	if !a.Says(&b) {
		t.Errorf("%+v and %+v differ", a, b)
	}
	if w.String() != "Mon Tue 08:00 to 18:00 Europe/Berlin" || (segment.Window{}).String() != "00:00 to 00:00 UTC" {
		t.Errorf("%q, %q", w, segment.Window{})
	}
	for what, other := range map[string]segment.Grant{
		"none": {}, "two": {Windows: []segment.Window{w, w}}, "a day": {Windows: []segment.Window{window(t, "08:00", "18:00", "Europe/Berlin", 1)}},
		"an hour": {Windows: []segment.Window{window(t, "08:00", "19:00", "Europe/Berlin", 1, 2)}},
		"a zone":  {Windows: []segment.Window{window(t, "08:00", "18:00", "Europe/Paris", 1, 2)}},
		"a begin": {Windows: []segment.Window{w}, NotBefore: time.Unix(1, 0)},
	} {
		if a.Says(&other) || other.Says(&a) {
			t.Errorf("%s: they say the same", what)
		}
	}
}
