package gossip

import "github.com/ravel-lb/ravel"

// The topics of cells: what a name and a value mean. They are numbers of the wire format (FORMAT.md). A cell of a topic
// that is not known here is kept and handed on.
const (
	topicRoster   = 1 // the fleet's; name: service, address
	topicRegister = 2 // the fleet's; name: the register's

	topicDirector   = 16 // the life of a director: its presence hides what its earlier lives said
	topicRealserver = 17 // the same of a realserver
	topicService    = 18 // ravel.ServiceReport; name: service
	topicUses       = 19 // services; name: the real server's address
	topicHealth     = 20 // ravel.Health; name: the real server's address
	topicSelf       = 21 // sessions, table size
	topicRedirect   = 22 // name: service
)

func lifeTopic(r ravel.Role) uint32 {
	if r == ravel.Director {
		return topicDirector
	}
	return topicRealserver
}

// serviceOf returns the encoded service that a cell is about, empty if it is about none.
func serviceOf(k key) string {
	switch k.topic {
	case topicService, topicRedirect:
		return k.name
	case topicRoster:
		n := serviceLen(k.name)
		if n > len(k.name) {
			return ""
		}
		return k.name[:n]
	}
	return ""
}
